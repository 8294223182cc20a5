"""What one model does with one image: all its maps, the tokens after each block, and their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....models.attention.base import Geometry
from ....models.errors import ConfigError, TransferError
from ....models.families import TokenLayout, attention_blocks, attention_shape, token_layout
from ..maps import attention_maps, map_divergence
from . import measures

MAX_MAP_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Summary:
    """What is kept of a look: entropy and distance by layer and head, the patch tokens after each block."""

    entropy: Tensor
    distance: Tensor
    patches: list[Tensor]
    num_tokens: int


@dataclass(frozen=True)
class Look:
    """The maps (L, H, N, N) of a model on one image, and the tokens (N, C) after each block; float32."""

    layout: TokenLayout
    maps: Tensor
    tokens: list[Tensor]

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    @property
    def signed(self) -> list[bool]:
        """By layer: whether some weight is negative."""
        return [bool((layer < 0).any()) for layer in self.maps]

    def rollout(self) -> Tensor:
        """(L, N, N)."""
        return measures.rollout(self.maps)

    def entropy(self) -> Tensor:
        """(L, H), in nats."""
        return measures.entropy(self.maps)

    def distance(self) -> Tensor:
        """(L, H), in patches."""
        return measures.mean_distance(self.maps, self.geometry)

    def summary(self) -> Summary:
        """Return all but the maps."""
        patches = [tokens[self.layout.num_prefix :] for tokens in self.tokens]
        return Summary(self.entropy(), self.distance(), patches, self.layout.num_tokens)


@torch.no_grad()
def look(model: nn.Module, image: Tensor) -> Look:
    """Run `model` on one image (1, C, H, W).

    A layer that is not linear in V gives the rows of its Jacobian, at a backward pass a token and channel.

    Raises:
        TransferError: the maps of the model would not fit in 4 GB.
        UnsupportedModelError: a model of another kind.
    """
    layout, shape = token_layout(model), attention_shape(model)
    size = 4 * shape.depth * shape.num_heads * layout.num_tokens**2
    if size > MAX_MAP_BYTES:
        raise TransferError(
            f"the maps of {shape.depth} layers, {shape.num_heads} heads and {layout.num_tokens} tokens take "
            f"{size / 2**30:.1f} GB, and at most {MAX_MAP_BYTES / 2**30:.0f} are taken; give a smaller --img_size"
        )
    with _tokens(model) as tokens:
        by_layer = attention_maps(model, image)
    maps = torch.stack([by_layer[layer][0].float().cpu() for layer in sorted(by_layer)])
    return Look(layout, maps, tokens)


def query_token(word: str, layout: TokenLayout) -> int:
    """Return the token of a query: a patch by its number, row by row from 0, or a prefix token (`cls`, `reg0`).

    Raises ConfigError for one that is not there.
    """
    if word in layout.prefix:
        return layout.prefix.index(word)
    patches = layout.grid[0] * layout.grid[1]
    if word.isdecimal() and int(word) < patches:
        return layout.num_prefix + int(word)
    names = "".join(f", {name}" for name in layout.prefix)
    raise ConfigError(f"--query {word!r}: valid are patches 0 to {patches - 1}{names}")


def token_word(token: int, layout: TokenLayout) -> str:
    """Return the word that `query_token` reads as this token."""
    return layout.prefix[token] if token < layout.num_prefix else str(token - layout.num_prefix)


def default_query(layout: TokenLayout) -> str:
    """Return the class token, or the patch in the middle of a model without one."""
    height, width = layout.grid
    return "cls" if "cls" in layout.prefix else str((height // 2) * width + width // 2)


def token_name(token: int, layout: TokenLayout) -> str:
    """Return the name of a token in titles."""
    if token < layout.num_prefix:
        return {"cls": "class token"}.get(layout.prefix[token], layout.prefix[token])
    row, column = divmod(token - layout.num_prefix, layout.grid[1])
    return f"patch {token - layout.num_prefix} (row {row}, column {column})"


def check_comparable(teacher: nn.Module, student: nn.Module) -> None:
    """Raise TransferError where two models cannot be put side by side layer by layer, patch by patch."""
    depths = [len(attention_blocks(model)) for model in (teacher, student)]
    if depths[0] != depths[1]:
        raise TransferError(
            f"the teacher has {depths[0]} blocks and the student {depths[1]}: no layers go together"
        )
    grids = [token_layout(model).grid for model in (teacher, student)]
    if grids[0] != grids[1]:
        theirs, ours = (f"{height}x{width}" for height, width in grids)
        raise TransferError(
            f"the teacher has {theirs} patches and the student {ours}: give an --img_size of both"
        )


def divergence(teacher: Look, student: Look) -> list[float]:
    """Return the Jensen-Shannon divergence of the shares by layer, in nats; unequal heads are matched.

    Where prefix tokens differ, of what patches take from patches.
    """
    skips = (
        (0, 0) if teacher.layout == student.layout else (teacher.layout.num_prefix, student.layout.num_prefix)
    )
    match = teacher.maps.shape[1] != student.maps.shape[1]
    theirs, ours = (
        measures.shares(each.maps[..., s:, s:]) for each, s in zip((teacher, student), skips, strict=True)
    )
    return [map_divergence(t[None], s[None], match_heads=match) for t, s in zip(theirs, ours, strict=True)]


def cka(teacher: list[list[Tensor]], student: list[list[Tensor]]) -> list[float]:
    """Return the linear CKA of the patch tokens (P, C) of each image and layer; a sample is a patch."""
    by_layer = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    return [measures.linear_cka(torch.cat(theirs), torch.cat(ours)) for theirs, ours in by_layer]


@contextmanager
def _tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tokens (N, C) that leave each block while the model runs."""
    tokens: list[Tensor] = []

    def keep(block: nn.Module, inputs: object, out: Tensor) -> None:
        tokens.append(out[0].float().cpu())

    hooks = [block.register_forward_hook(keep) for block in attention_blocks(model)]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()
