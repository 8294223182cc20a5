"""Read the sizes of a vision tower from its tensors, and compare them with its config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....models.errors import CheckpointError
from ...weights import Weights
from .hf_config import Config

TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Tower:
    """The sizes of a vision tower; those that tensors show agree with config.json."""

    width: int
    depth: int
    hidden: int
    """Rows of the first projection of the MLP."""
    patch: tuple[int, int]
    channels: int
    heads: int | None
    """None without config.json: no tensor shows it."""
    image: tuple[int, int] | None


def measure(
    weights: Weights,
    config: Config,
    *,
    heads: int,
    prefix: int,
    hidden_setting: str | None = "intermediate_size",
) -> Tower:
    """Return the sizes of the tower under timm's names.

    `heads` is transformers' default, `prefix` the number of tokens before the patches in the position
    embedding, `hidden_setting` what config.json calls the width inside the MLP, where it says it.

    Raises CheckpointError: a tensor that shows a size is absent, or config.json contradicts it.
    """
    width, channels, *patch = _shape(weights, "patch_embed.proj.weight", 4)
    size = (patch[0], patch[1])
    depth = _depth(weights)
    hidden, _ = matrix(weights, _first_projection(weights))
    config.agree("hidden_size", width)
    config.agree("num_hidden_layers", depth)
    config.agree("patch_size", size)
    config.agree("num_channels", channels)
    if hidden_setting is not None:
        config.agree(hidden_setting, hidden)
    number = (config.whole("num_attention_heads") or heads) if config.values else None
    if number is not None and width % number:
        raise CheckpointError(
            f"{weights.origin}: config.json says num_attention_heads={number}, which does not divide the width {width}"
        )
    return Tower(width, depth, hidden, size, channels, number, _image(weights, config, size, prefix))


def _shape(weights: Weights, name: str, ndim: int) -> tuple[int, ...]:
    tensor = weights.tensors.get(name)
    if tensor is None or tensor.ndim != ndim or 0 in tensor.shape:
        raise CheckpointError(
            f"{weights.origin} is not whole: {'it lacks ' if tensor is None else 'it has an odd '}{name}"
        )
    return tuple(tensor.shape)


def matrix(weights: Weights, name: str) -> tuple[int, int]:
    """Return rows and columns of a weight. Raises CheckpointError: it is not there or is no matrix."""
    rows, columns = _shape(weights, name, 2)
    return rows, columns


def _first_projection(weights: Weights) -> str:
    gate = "blocks.0.mlp.fc1_g.weight"
    return gate if gate in weights.tensors else "blocks.0.mlp.fc1.weight"


def _depth(weights: Weights) -> int:
    blocks = {int(key.split(".")[1]) for key in weights.tensors if key.startswith("blocks.")}
    absent = next(index for index in range(len(blocks) + 1) if index not in blocks)
    if absent < len(blocks):
        raise CheckpointError(f"{weights.origin} is not whole: it lacks block {absent} of {1 + max(blocks)}")
    return len(blocks)


def _image(weights: Weights, config: Config, patch: tuple[int, int], prefix: int) -> tuple[int, int] | None:
    """Height and width of the images: as config.json says, where the embeddings of positions agree."""
    position = weights.tensors.get("pos_embed")
    tokens = position.shape[1] - prefix if position is not None and position.ndim == 3 else None
    tables = (tensor for name, tensor in weights.tensors.items() if name.endswith(TABLE) and tensor.ndim == 2)
    offsets = next((table.shape[0] for table in tables), None)
    image = config.pair("image_size")
    if image is None:
        side = _side(tokens, offsets)
        return (side * patch[0], side * patch[1]) if side else None
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    said = f"which makes {rows}x{columns} patches"
    if rows * columns == 0:
        raise config.wrong("image_size", f"{said}: those of its weights are {patch[0]}x{patch[1]} pixels")
    if tokens not in (None, rows * columns):
        raise config.wrong("image_size", f"{said}, but its pos_embed has {tokens}")
    if offsets not in (None, (2 * rows - 1) * (2 * columns - 1) + 3):
        raise config.wrong("image_size", f"{said}, but its tables of relative positions have {offsets} rows")
    return image


def _side(tokens: int | None, offsets: int | None) -> int | None:
    """Return the side of a square grid with this many patches, or with this many offsets between patches."""
    count, halves = (tokens, 1) if tokens is not None else (None if offsets is None else offsets - 3, 2)
    root = math.isqrt(max(count or 0, 0))
    return (root + halves - 1) // halves if root * root == count else None
