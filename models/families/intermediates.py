"""Models of timm of no family: whole results, and the maps that timm calls intermediate features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.base import Geometry
from ..errors import UnsupportedModelError
from .site import OF_PLAIN, AnySize, Hosts, Site, size_of, valueless, vit

SEEN, OUTLINES, SIZE = "_watched_outputs", "_outlines", "_image_size"
"""Attributes of a model: who looks at its outputs, their shapes by image size, and the size that it was resized to."""
TOKENS = -1
"""The place of the last features among the outputs that are watched."""


@dataclass(frozen=True)
class Outline:
    """The shapes of what a model gives for images of one size."""

    widths: tuple[int, ...]
    """The width of each map."""
    stages: tuple[tuple[int, ...], ...]
    """The numbers of the maps, those of one grid in a row together."""
    geometries: tuple[Geometry, ...]
    """The tokens of each stage, and then those of the last features."""


def outline(model: nn.Module, size: tuple[int, int]) -> Outline:
    """Return the shapes of a model's outputs for images of a size (height, width).

    Raises UnsupportedModelError: it does not take such images.
    """
    known: dict[tuple[int, int], Outline] | None = getattr(model, OUTLINES, None)
    if known is None:
        known = vars(model)[OUTLINES] = {}
    if size not in known:
        known[size] = _measure(model, size)
    return known[size]


def _measure(model: nn.Module, size: tuple[int, int]) -> Outline:
    """Run a copy without values on an image, and return the shapes."""
    twin: Any = valueless(model).eval()
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    image = torch.empty(1, REST.channels(model), *size, dtype=dtype, device="meta")
    try:
        with torch.no_grad():
            tokens, maps = twin.forward_intermediates(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no intermediate features of images of {size[0]}x{size[1]}: "
            f"{' '.join(str(error).split())[:200]}; set img_size to a size that it takes"
        ) from error
    grids = [(int(each.shape[2]), int(each.shape[3])) for each in maps]
    stages = tuple(tuple(each) for _, each in groupby(range(len(grids)), lambda index: grids[index]))
    own = (Geometry(0, grids[stage[0]]) for stage in stages)
    last = _last(tokens.shape[1:] if isinstance(tokens, Tensor) else (), grids[-1])
    return Outline(tuple(int(each.shape[1]) for each in maps), stages, (*own, last))


def _last(shape: Sequence[int], grid: tuple[int, int]) -> Geometry:
    """Return the tokens of the last features, on the grid of the last map unless their shape says another."""
    if len(shape) == 3 and grid not in (tuple(shape[:2]), tuple(shape[1:])):
        grid = (shape[1], shape[2]) if shape[0] > shape[2] else (shape[0], shape[1])
    return Geometry(max(shape[0] - grid[0] * grid[1], 0) if len(shape) == 2 else 0, grid)


@dataclass(eq=False)
class Watcher:
    """Somebody who looks at an output of a model until it is removed."""

    model: nn.Module
    place: int
    see: Callable[[Tensor], None]

    def add(self) -> Watcher:
        vars(self.model)[SEEN] = [*watchers(self.model), self]
        return self

    def remove(self) -> None:
        vars(self.model)[SEEN] = [each for each in watchers(self.model) if each is not self]


def watchers(model: nn.Module) -> list[Watcher]:
    """Return who looks at the outputs of a model."""
    return getattr(model, SEEN, [])


class Intermediates(AnySize):
    """Any model of timm with `forward_intermediates`: a block is what `feature_info` lists, and its output that map.

    The maps of one grid in a row are a stage. A map has no prefix tokens, and no attention is read.
    """

    name = "other models of timm"
    models = ()
    blocks = ()
    hosts: ClassVar[Hosts] = {}
    reads_attention = False
    cannot: ClassVar = dict.fromkeys(OF_PLAIN, "has no attention that is read")

    def takes(self, model: nn.Module) -> bool:
        """Return whether a model says its intermediate features and its head as timm's models do."""
        return hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")

    def paths(self, model: Any) -> list[list[str]]:
        names = [str(each["module"]) for each in model.feature_info]
        return [[names[index] for index in stage] for stage in self._outline(model).stages]

    def _outline(self, model: nn.Module) -> Outline:
        return outline(model, self.image_size(model))

    def geometries(self, model: nn.Module, size: tuple[int, int]) -> list[Geometry]:
        """Return the tokens of each stage, and then those of the last features."""
        return list(outline(model, size).geometries)

    def sites(self, model: nn.Module) -> Iterator[Site]:
        known, paths = self._outline(model), self.paths(model)
        for stage, numbers in enumerate(known.stages):
            for place, index in enumerate(numbers):
                name = str(index) if len(paths) == 1 else f"stage{stage + 1}.{place}"
                path, geometry = paths[stage][place], known.geometries[stage]
                yield Site(index, name, stage, place, path, known.widths[index], 0, 0, geometry)

    def prefix(self, model: nn.Module, site: Site) -> tuple[str, ...]:
        return ()

    def has_bias(self, model: nn.Module, site: Site) -> bool:
        return False

    def channels(self, model: nn.Module) -> int:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        return 3 if first is None else first.in_channels

    def fixed_size(self, model: nn.Module) -> tuple[int, int] | None:
        described = getattr(model, "pretrained_cfg", None) or {}
        strict = any(
            getattr(module, "strict_img_size", False) for module in model.modules() if size_of(module)
        )
        return self.image_size(model) if strict or described.get("fixed_input_size") else None

    def is_strict(self, model: nn.Module) -> bool:
        return self.fixed_size(model) is not None

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Return the size that the model was resized to or built for, else that of its published weights."""
        built = (size for module in model.modules() if (size := size_of(module)))
        described = getattr(model, "pretrained_cfg", None) or {}
        own = vars(model).get(SIZE) or next(built, None)
        height, width = own or tuple(described.get("input_size", ())[1:]) or (224, 224)
        return int(height), int(width)

    known_size = image_size

    def resize(self, model: nn.Module, size: tuple[int, int]) -> None:
        """Note the size of the images; a model that does not take it is refused where it is used."""
        vars(model)[SIZE] = size

    def recomputed(self, model: nn.Module) -> list[nn.Module]:
        return []

    def watch_block(self, model: nn.Module, index: int, see: Callable[[Tensor], None]) -> Watcher:
        return Watcher(model, index, see).add()

    def watch_tokens(self, model: nn.Module, see: Callable[[Any], None]) -> Watcher:
        return Watcher(model, TOKENS, see).add()

    def features(self, model: nn.Module, images: Tensor) -> Any:
        found = self._run(model, images) if self._maps(model) else vit(model).forward_features(images)
        for watcher in watchers(model):
            if watcher.place == TOKENS:
                watcher.see(found)
        return found

    def run_blocks(self, model: nn.Module, images: Tensor) -> None:
        self._run(model, images, stop_early=True, intermediates_only=True)

    def _maps(self, model: nn.Module) -> list[int]:
        return sorted({watcher.place for watcher in watchers(model)} - {TOKENS})

    def _run(self, model: nn.Module, images: Tensor, **how: bool) -> Any:
        """Return the last features, and show the maps that are watched as (B, N, C)."""
        timm_model, wanted = model, self._maps(model)
        found: Any = timm_model.forward_intermediates(images, indices=wanted, **how)  # type: ignore[operator]
        last, maps = (None, found) if how else found
        for index, image in zip(wanted, maps, strict=True):
            for watcher in watchers(model):
                if watcher.place == index:
                    watcher.see(image.flatten(2).transpose(1, 2))
        return last

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return self.head(model, self.features(model, images)) if watchers(model) else model(images)

    def tokens(self, features: Any) -> Tensor:
        """Return the last features. Raises UnsupportedModelError: they are not one tensor."""
        if not isinstance(features, Tensor):
            raise UnsupportedModelError(
                f"a model whose last features are a {type(features).__name__} has no features of patches: use "
                "transfer.tokens=pooled"
            )
        return features

    def patches(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        found: Tensor = tokens
        if found.dim() == 3:
            return found[:, geometry.num_prefix :].reshape(len(found), *geometry.grid, -1)
        return found.permute(0, 2, 3, 1) if found.shape[2:] == geometry.grid else found


REST = Intermediates()
