"""What one model does with one image: the maps of its layers, the tokens after each block, and their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....models.errors import TransferError
from ....models.families import (
    TokenLayout,
    blocks_of,
    check_supported,
    depths,
    evaluating,
    is_pyramid,
    sites,
    token_layout,
)
from ..key_places import KeyPlaces
from ..layer_maps import key_count, layer_maps
from ..maps import map_divergence
from ..merge_places import collect_merges
from . import measures
from .shown_layers import ShownLayer, ShownLook

MAX_MAP_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LayerLook(ShownLayer):
    """A layer of a model on one image; float32."""

    rolled: Tensor
    tokens: Tensor
    """The tokens (N, C) after the block."""

    @property
    def patches(self) -> Tensor:
        """Return the tokens after the block without prefix tokens."""
        return self.tokens[self.layout.num_prefix :]

    def entropy(self) -> Tensor | None:
        """Return the entropy of each head (H), in nats."""
        return None if self.maps is None else measures.entropy(self.maps)

    def distance(self) -> Tensor | None:
        """Return the mean distance of each head (H), in patches of the stage."""
        if self.maps is None:
            return None
        start = self.layout.num_prefix
        return measures.mean_distance(self.maps[:, start:, start:], self.places.distances())

    def shares_of_tokens(self, skip: int = 0) -> Tensor | None:
        """Return the shares of all tokens, (H, N, N), without the first `skip` ones."""
        return (
            None if self.maps is None else measures.shares(self.places.on_tokens(self.maps)[:, skip:, skip:])
        )


@dataclass(frozen=True)
class Summary:
    """What is kept of a look: by layer entropy and distance of each head, and the patch tokens after the block."""

    entropy: list[Tensor | None]
    distance: list[Tensor | None]
    patches: list[Tensor]
    keys: list[int]
    """The number of keys of each query."""
    stages: list[int]
    merges: Tensor
    """Of each deformable merge the mean shift of a place in pixels, and the share of places outside, (merges, 2)."""


@dataclass(frozen=True)
class Look(ShownLook):
    """The layers of a model on one image, and its deformable merges."""

    layers: Sequence[LayerLook]

    def summary(self) -> Summary:
        """Return all but the maps."""
        return Summary(
            [layer.entropy() for layer in self.layers],
            [layer.distance() for layer in self.layers],
            [layer.patches for layer in self.layers],
            [0 if layer.maps is None else layer.maps.shape[-1] for layer in self.layers],
            [layer.stage for layer in self.layers],
            torch.tensor([[each.shift().mean(), each.outside().mean()] for each in self.merges]),
        )


@torch.no_grad()
def look(model: nn.Module, image: Tensor) -> Look:
    """Run `model` on one image (1, C, H, W).

    A layer that is not linear in V gives the rows of its Jacobian, at a backward pass a token and channel.

    Raises:
        TransferError: the maps of the model would not fit in 4 GB.
        UnsupportedModelError: a model of another kind.
    """
    check_supported(model, copied=True, pyramids=True)
    _check_memory(model)
    with evaluating(model), _tokens(model) as tokens, collect_merges(model, image) as merges:
        model(image)
    found, places = layer_maps(model, image, range(len(tokens))), sites(model)
    layers: list[LayerLook] = []
    for site, layout in zip(places, token_layouts(model), strict=True):
        seen = found.get(site.index)
        maps = None if seen is None else seen.weights[0].cpu()
        keys = KeyPlaces(layout.geometry) if seen is None else seen.places
        before = layers[-1].rolled if site.place else torch.eye(layout.num_tokens)
        rolled = (
            before if maps is None else measures.roll(before, keys.on_tokens(measures.shares(maps).mean(0)))
        )
        layers.append(LayerLook(site.stage, layout, maps, keys, rolled, tokens[site.index]))
    return Look(layers, merges)


def _check_memory(model: nn.Module) -> None:
    found = sites(model)
    numbers = [site.num_heads * site.shape.geometry.num_tokens * key_count(model, site) for site in found]
    size = 4 * sum(numbers)
    if size > MAX_MAP_BYTES:
        most = max(range(len(numbers)), key=numbers.__getitem__)
        shape = found[most].shape
        raise TransferError(
            f"the maps of {len(found)} layers take {size / 2**30:.1f} GB (layer {most}: {shape.num_heads} heads, "
            f"{shape.geometry.num_tokens} tokens), and at most {MAX_MAP_BYTES / 2**30:.0f} are taken; give a smaller "
            "--img_size"
        )


def token_layouts(model: nn.Module) -> list[TokenLayout]:
    """Return the tokens of each layer.

    Raises UnsupportedModelError: the model has no image size.
    """
    places = sites(model)
    if not is_pyramid(model):
        return [token_layout(model)] * len(places)
    stages = [site.shape.geometry for site in places]
    return [TokenLayout(("cls",) * stage.num_prefix, stage.grid) for stage in stages]


def check_comparable(teacher: nn.Module, student: nn.Module) -> None:
    """Raise TransferError where two models cannot be put side by side layer by layer, patch by patch."""
    blocks = [depths(model) for model in (teacher, student)]
    if blocks[0] != blocks[1]:
        theirs, ours = (" + ".join(map(str, each)) for each in blocks)
        raise TransferError(f"the teacher has {theirs} blocks and the student {ours}: no layers go together")
    for stage, (t, s) in enumerate(zip(token_layouts(teacher), token_layouts(student), strict=True)):
        if t.grid != s.grid:
            theirs, ours = (f"{height}x{width}" for height, width in (t.grid, s.grid))
            where = f" in layer {stage}" if len(blocks[0]) > 1 else ""
            raise TransferError(
                f"the teacher has {theirs} patches and the student {ours}{where}: give an --img_size of both"
            )


def divergence(teacher: Look, student: Look) -> list[float | None]:
    """Return the Jensen-Shannon divergence of the shares by layer, in nats; unequal heads are matched.

    Where prefix tokens differ, of what patches take from patches. None where a block has no attention.
    """
    return [_divergence(t, s) for t, s in zip(teacher.layers, student.layers, strict=True)]


def _divergence(teacher: LayerLook, student: LayerLook) -> float | None:
    alike = teacher.layout == student.layout
    theirs, ours = (
        each.shares_of_tokens(0 if alike else each.layout.num_prefix) for each in (teacher, student)
    )
    if theirs is None or ours is None:
        return None
    return map_divergence(theirs[None], ours[None], match_heads=teacher.heads != student.heads)


def cka(teacher: Sequence[Sequence[Tensor]], student: Sequence[Sequence[Tensor]]) -> list[float | None]:
    """Return the linear CKA of the patch tokens (P, C) of each image and layer; a sample is a patch."""
    by_layer = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    return [measures.linear_cka(torch.cat(theirs), torch.cat(ours)) for theirs, ours in by_layer]


@contextmanager
def _tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tokens (N, C) that leave each block while the model runs."""
    tokens: list[Tensor] = []

    def keep(block: nn.Module, inputs: object, out: Tensor) -> None:
        tokens.append(out[0].flatten(0, -2).float().cpu())

    hooks = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()
