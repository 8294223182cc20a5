"""Bound what a constructor may make: stop it when a model outgrows the weights that it is built for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules import module as hooks

PARTS_EACH, SPARE_PARTS, MOST_PARTS = 8, 10_000, 200_000
"""Modules, parameters and buffers for each tensor of the weights, and beside that; however many tensors there are."""
SPARE_NUMBERS, MOST_INDICES = 1 << 26, 1 << 29
"""Numbers beside twice those of the weights (positions of larger images), and whole numbers (tables of relative
positions, which lie in no file: a BEiT of 24 layers has 400 million of them at 1,024 pixels)."""


@contextmanager
def bounded(weights: Collection[Tensor]) -> Iterator[None]:
    """Raise ValueError out of a constructor in this thread as soon as what it makes is far more than `weights`."""
    builder, held = threading.get_ident(), sum(tensor.numel() for tensor in weights)
    parts = min(PARTS_EACH * len(weights) + SPARE_PARTS, MOST_PARTS)
    left = {"parts": parts, "numbers": 2 * held + SPARE_NUMBERS, "indices": MOST_INDICES}

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != builder:
            return
        left["parts"] -= 1
        if isinstance(part, Tensor):
            left["numbers" if part.is_floating_point() else "indices"] -= part.numel()
        if min(left.values()) < 0:
            raise ValueError(
                "the model would be far larger than its weights: "
                f"its weights hold {len(weights):,} tensors with {held:,} numbers"
            )

    with ExitStack() as stack:
        for kind in ("parameter", "buffer", "module"):
            stack.callback(getattr(hooks, f"register_module_{kind}_registration_hook")(count).remove)
        yield
