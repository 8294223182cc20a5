"""What stands in a block of a pyramid that has no attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NoAttention(nn.Module):
    """Add nothing to the tokens: the block is its MLP alone, as in the early stages of LIT (arXiv:2105.14217)."""

    plan_size: tuple[int, int] | None = None
    """The image size for which the model was converted."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return x.new_zeros(())

    def set_input_size(self, *sizes: Any) -> None:
        """Do nothing: there is nothing that depends on the size."""
