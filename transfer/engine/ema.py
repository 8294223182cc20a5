"""Exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parallel import local


class WeightAverage:
    """avg <- decay * avg + (1 - decay) * weight after each optimiser step, for the student alone.

    Kept as tensors by name rather than as a second module: nothing of the teacher can slip in, and the
    average of a sharded student is sharded the same way. timm's ModelEmaV3 copies the module, with whatever
    it refers to.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # The parameters themselves: a sharded one may move its memory, which a detached tensor misses.
        state = model.state_dict(keep_vars=True)
        self._weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights as they are now."""
        torch._foreach_lerp_(_locals(self.average), _locals(self._weights), 1 - self.decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the average; afterwards its own weights again, bit for bit."""
        own = [tensor.clone() for tensor in _locals(self._weights)]
        torch._foreach_copy_(_locals(self._weights), _locals(self.average))
        try:
            yield
        finally:
            torch._foreach_copy_(_locals(self._weights), own)

    def predictor(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`predict` of the model, run with the average."""

        def averaged(images: Tensor) -> Tensor:
            with self.applied():
                return predict(images)

        return averaged


def _locals(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors.values()]
