"""Choose timm's architecture for a tower of transformers: the published one if the sizes match, else a near one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from timm.models import is_model

from ....models.errors import Json, JsonDict
from .sizes import Tower

SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "giant packed": (1536, 40, 24, 8192),
    "small_plus": (384, 12, 6, 1536),
    "huge_plus": (1280, 32, 20, 5120),
    "7b": (4096, 40, 32, 8192),
}
"""timm's name of a size: width, depth, heads, rows of the MLP's first projection."""


@dataclass(frozen=True)
class Lineage:
    """timm's architectures of one kind; the first size, patch and image are those to start from."""

    template: str
    """Of their names, from {size}, {patch} and {image}."""
    sizes: tuple[str, ...]
    patches: tuple[int, ...] = (16,)
    images: tuple[int, ...] = (224,)

    def name(self, size: str, patch: int | None, image: int | None) -> str:
        """timm's name, of a model that there may not be."""
        return self.template.format(size=size.split()[0], patch=patch, image=image)


def architecture_of(lineage: Lineage, tower: Tower) -> tuple[str, JsonDict] | None:
    """timm's name for a tower, and the arguments in which the tower differs from it.

    None where no config.json gives the number of heads and the sizes are of no published model.
    """
    match = next((name for name in lineage.sizes if _is_size(SIZES[name], tower)), None)
    if match is None and tower.heads is None:
        return None
    patch, image = _square(tower.patch), _square(tower.image)
    sizes = [name for name in (match, lineage.sizes[0]) if name is not None]
    choices = product(sizes, (patch, *lineage.patches), (image, *lineage.images))
    size, pixels, resolution = next(choice for choice in choices if is_model(lineage.name(*choice)))
    published = {"patch_size": pixels, "img_size": resolution if "{image}" in lineage.template else None}
    found = {"patch_size": _plain(tower.patch), "img_size": _plain(tower.image)}
    arguments = {key: value for key, value in found.items() if value not in (None, published[key])}
    if tower.channels != 3:
        arguments["in_chans"] = tower.channels
    name = lineage.name(size, pixels, resolution)
    return name, arguments if size == match else {**arguments, **_sizes(SIZES[size], tower)}


def _is_size(size: tuple[int, int, int, int], tower: Tower) -> bool:
    width, depth, heads, hidden = size
    same = (width, depth, hidden) == (tower.width, tower.depth, tower.hidden)
    return same and tower.heads in (None, heads)


def _sizes(size: tuple[int, int, int, int], tower: Tower) -> Json:
    width, depth, heads, _ = size
    ratio = tower.hidden / tower.width
    if int(tower.width * ratio) != tower.hidden:
        ratio = (tower.hidden + 0.5) / tower.width  # timm rounds down
    named = {
        "embed_dim": (tower.width, width),
        "depth": (tower.depth, depth),
        "num_heads": (tower.heads, heads),
    }
    return {key: ours for key, (ours, theirs) in named.items() if ours != theirs} | {"mlp_ratio": ratio}


def _square(pair: tuple[int, int] | None) -> int | None:
    return pair[0] if pair is not None and pair[0] == pair[1] else None


def _plain(pair: tuple[int, int] | None) -> int | list[int] | None:
    return None if pair is None else _square(pair) or list(pair)
