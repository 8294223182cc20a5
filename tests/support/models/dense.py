"""Attention transfer the dense way: every map formed, in the plainest words. The reference of the tests.

timm's attention layers all call `torch.nn.functional.scaled_dot_product_attention`; replacing it shows every
layer's queries, keys and values, whatever the family, without any code of the library under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Layer:
    """One attention layer of a run: q, k, v, map and output, each with heads in the second dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    map: Tensor
    out: Tensor
    logits: Tensor
    scale: float


Override = Callable[[int, Layer], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Layer:
    """softmax(s q kᵀ + mask) v, dense."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q @ k.transpose(-2, -1)) * scale
    logits = logits if mask is None else logits + mask
    return Layer(q, k, v, logits.softmax(-1), logits.softmax(-1) @ v, logits, scale)


@contextmanager
def dense_attention(layers: list[Layer], override: Override | None = None) -> Iterator[None]:
    """Record each attention layer that runs; `override(index, layer)` may replace its output."""
    fused = F.scaled_dot_product_attention

    def dense(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):  # type: ignore[no-untyped-def]
        layer = attend(q, k, v, attn_mask, scale)
        layers.append(layer)
        return layer.out if override is None else override(len(layers) - 1, layer)

    F.scaled_dot_product_attention = dense  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def run(model: nn.Module, images: Tensor, override: Override | None = None) -> tuple[Tensor, list[Layer]]:
    """Logits and attention layers of a model's blocks; a pooling head's attention comes after them and is its own."""
    depth = len(model.blocks)
    layers: list[Layer] = []

    def within_blocks(index: int, layer: Layer) -> Tensor:
        return layer.out if override is None or index >= depth else override(index, layer)

    with dense_attention(layers, within_blocks):
        logits = model(images)
    return logits, layers[:depth]


def cross_entropy(teacher_map: Tensor, student_logits: Tensor) -> Tensor:
    """−Σ_j p_t log p_s, mean over batch, heads and queries."""
    return -(teacher_map * student_logits.log_softmax(-1)).sum(-1).mean()


TINY = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit_no_prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.5}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"global_pool": "map"}),
    "beit": ("beit_base_patch16_224", {}),
    "beit_shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva02": ("eva02_base_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
}


def tiny(
    family: str = "vit", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object
) -> nn.Module:
    """A small model of a family with every parameter random, so that no term of a gradient vanishes."""
    name, options = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, **{**TINY, **options, **changes})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def images(
    batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (32, 48)
) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(model: nn.Module) -> Tensor:
    """All gradients of a model in one float64 vector; a missing one counts as zero."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.double().flatten() for grad in grads])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))
