"""Bound what a constructor may make: stop it when a model outgrows the weights that it is built for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

PARTS_EACH, SPARE_PARTS, MOST_PARTS = 8, 10_000, 200_000
"""Modules, parameters and buffers for each tensor of the weights, and beside that; however many tensors there are."""
SPARE_ELEMENTS = 1 << 26
"""Numbers that a model may have beside twice those of its weights: positions of larger images, tables of offsets."""
MOST_INDICES = 1 << 29
"""Numbers in integer tables, as of relative positions. They grow with the image and lie in no file: a BEiT of 24 layers
has 400 million of them at 1,024 pixels."""


class OutgrownError(ValueError):
    """A model that became larger than its weights, while it was built."""


class _Count:
    """What the modules that this thread builds have registered so far."""

    def __init__(self, weights: Collection[Tensor]) -> None:
        self.thread = threading.get_ident()
        self.parts = min(PARTS_EACH * len(weights) + SPARE_PARTS, MOST_PARTS)
        self.held = sum(tensor.numel() for tensor in weights)
        self.elements = 2 * self.held + SPARE_ELEMENTS
        self.indices = MOST_INDICES
        self.words = f"its weights hold {len(weights):,} tensors with {self.held:,} numbers"

    def __call__(self, module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != self.thread:
            return
        self.parts -= 1
        if isinstance(part, Tensor) and part.is_floating_point():
            self.elements -= part.numel()
        elif isinstance(part, Tensor):
            self.indices -= part.numel()
        if min(self.parts, self.elements, self.indices) < 0:
            raise OutgrownError(f"the model would be far larger than its weights: {self.words}")


@contextmanager
def bounded(weights: Collection[Tensor]) -> Iterator[None]:
    """Raises OutgrownError out of a constructor as soon as what it makes is far more than `weights`."""
    count = _Count(weights)
    with ExitStack() as stack:
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        ):
            stack.callback(register(count).remove)
        yield
