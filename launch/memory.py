"""How much memory a step needs on a device, roughly, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.families import attention_blocks, attention_shape, token_layout
from ..transfer.config import RunConfig

FLOAT32 = 4
NOT_COUNTED = "the framework, workspaces, images, logits, fragmentation"


@dataclass(frozen=True)
class MemoryItem:
    """One thing that takes memory: what it is, its bytes, and how they were counted."""

    name: str
    size: int
    how: str


def estimate_memory(
    config: RunConfig,
    model: nn.Module,
    encoder: nn.Module,
    teacher: nn.Module | None,
    layers: int,
    shards: int,
) -> list[MemoryItem]:
    """The items of a training step on one device.

    Args:
        config: The run.
        model: All that is trained: the student with its projectors, or the autoencoder.
        encoder: The vision transformer in it, whose activations are counted.
        teacher: The frozen model that runs beside it.
        layers: How many layers are copied or distilled.
        shards: Processes that share the student's parameters, gradients and optimiser (FSDP), else 1.
    """
    count = parameter_count(model)
    trained = parameter_count(model, trained=True)
    split = f", over {shards} processes" if shards > 1 else ""
    items = [
        MemoryItem("student", count * FLOAT32 // shards, f"{_millions(count)} parameters in float32{split}"),
        MemoryItem("gradients", trained * FLOAT32 // shards, f"{_millions(trained)} trained{split}"),
        MemoryItem("optimiser", 2 * trained * FLOAT32 // shards, f"two values for each, as Adam{split}"),
    ]
    if config.optim.ema is not None:
        items.append(MemoryItem("moving average", count * FLOAT32 // shards, f"a copy of the student{split}"))
    if teacher is not None:
        frozen = parameter_count(teacher)
        items.append(MemoryItem("teacher", frozen * FLOAT32, f"{_millions(frozen)} parameters in float32"))
    values = activation_values(config, encoder, teacher, layers)
    width = FLOAT32 if config.engine.precision == "fp32" else 2
    how = f"{config.data.batch_size} images, {config.engine.precision}"
    if config.student.grad_checkpointing:
        how += ", block inputs only"
    items.append(MemoryItem("activations", config.data.batch_size * values * width, how))
    return items


def activation_values(config: RunConfig, student: nn.Module, teacher: nn.Module | None, layers: int) -> int:
    """Values kept for the backward pass, an image.

    A block of width D with an MLP of width M keeps eight of D a token (input and output of two norms, q, k, v
    and the attention's output) and two of M (around the activation); a fused attention kernel keeps no map.
    With checkpointing a block keeps its input, and one block is run again at a time. A distilled layer adds
    the teacher's q and k and the mixed keys. An autoencoder's encoder sees the visible
    tokens, its decoder all.
    """
    shape = attention_shape(student)
    block = 8 * shape.width + 2 * _mlp_width(attention_blocks(student)[0], shape.width)
    depth_values = shape.depth * block
    if config.student.grad_checkpointing:
        depth_values = shape.depth * shape.width + block
    tokens = token_layout(student).num_tokens
    values = tokens * depth_values
    if config.mode == "pretrain":
        decoder = config.pretrain
        values = round((1 - decoder.mask_ratio) * values)
        values += tokens * decoder.decoder_depth * 16 * decoder.decoder_dim
    if teacher is not None:
        of_teacher = attention_shape(teacher)
        kept = 2 * of_teacher.num_heads * of_teacher.head_dim + shape.width
        values += token_layout(teacher).num_tokens * layers * kept
    return values


def parameter_count(model: nn.Module, trained: bool = False) -> int:
    """Number of parameters, or of those that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def describe_memory(items: list[MemoryItem]) -> list[str]:
    """A line an item, the sum, and what is left out."""
    width = max(len(item.name) for item in items)
    lines = [f"{item.name:<{width}}  {_gibibytes(item.size):>9}  {item.how}" for item in items]
    total = sum(item.size for item in items)
    return [*lines, f"{'sum':<{width}}  {_gibibytes(total):>9}", f"not counted: {NOT_COUNTED}"]


def _mlp_width(block: Any, width: int) -> int:
    """Width of the hidden layer, of both halves for a gated MLP."""
    return sum(layer.out_features for layer in block.mlp.modules() if isinstance(layer, nn.Linear)) - width


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
