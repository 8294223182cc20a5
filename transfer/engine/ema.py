"""Exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parallel import local


class WeightAverage:
    """avg <- decay * avg + (1 - decay) * weight after each optimizer step, only for the student.

    It holds tensors by name instead of a second module, so it contains nothing of the teacher, and the average of a
    sharded student is sharded in the same way. timm's ModelEmaV3 copies the module with everything it refers to.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # Hold the parameters themselves: the memory of a sharded one may move, and a detached tensor would miss it.
        state = model.state_dict(keep_vars=True)
        self._weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        torch._foreach_lerp_(_locals(self.average), _locals(self._weights), 1 - self.decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Load the average into the model inside the block; then restore its own weights, bit for bit."""
        own = [tensor.clone() for tensor in _locals(self._weights)]
        torch._foreach_copy_(_locals(self._weights), _locals(self.average))
        try:
            yield
        finally:
            torch._foreach_copy_(_locals(self._weights), own)

    def predictor(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `predict` of the model, run with the average."""

        def averaged(images: Tensor) -> Tensor:
            with self.applied():
                return predict(images)

        return averaged


def _locals(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors.values()]
