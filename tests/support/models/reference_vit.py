"""The papers' vision transformers as plain equations on the tensors of their own files, in float64.

Each function takes the names that the source gives the tensors, and returns the normalized tokens (B, N, C)
unless it says otherwise. No line is shared with timm or with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Tensors = Mapping[str, Tensor]
EPS = 1e-6


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norm(x: Tensor, t: Tensors, name: str, eps: float = EPS) -> Tensor:
    return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)


def linear(x: Tensor, t: Tensors, name: str) -> Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, H, N, D) each, to (B, N, H D)."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def patches(images: Tensor, t: Tensors) -> Tensor:
    kernel = t["patch_embed.proj.weight"]
    cut = functional.unfold(images, kernel.shape[-2:], stride=kernel.shape[-2:]).transpose(1, 2)
    return cut @ kernel.flatten(1).T + t["patch_embed.proj.bias"]


def with_prefix(x: Tensor, *tokens: Tensor) -> Tensor:
    return torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)


def attention(x: Tensor, t: Tensors, name: str, heads: int) -> Tensor:
    q, k, v = (split(part, heads) for part in linear(x, t, f"{name}.qkv").chunk(3, -1))
    return linear(softmax_attention(q, k, v), t, f"{name}.proj")


def mlp(x: Tensor, t: Tensors, name: str) -> Tensor:
    return linear(gelu(linear(x, t, f"{name}.fc1")), t, f"{name}.fc2")


def packed_swiglu(x: Tensor, t: Tensors, name: str) -> Tensor:
    gate, value = linear(x, t, f"{name}.w12").chunk(2, -1)
    return linear(gate * torch.sigmoid(gate) * value, t, f"{name}.w3")


def run(
    x: Tensor,
    t: Tensors,
    heads: int,
    blocks: Sequence[str],
    *,
    scales: tuple[str, str] | None = None,
    ffn: Callable[[Tensor, Tensors, str], Tensor] = mlp,
) -> Tensor:
    """Pre-norm blocks: x + s1 Attention(Norm(x)), then x + s2 MLP(Norm(x)), with s = 1 without LayerScale."""
    for b in blocks:
        first, second = (t[b + scale] for scale in scales) if scales else (torch.ones(()), torch.ones(()))
        x = x + first * attention(norm(x, t, f"{b}norm1"), t, f"{b}attn", heads)
        x = x + second * ffn(norm(x, t, f"{b}norm2"), t, f"{b}mlp")
    return x


def numbered(depth: int) -> list[str]:
    return [f"blocks.{i}." for i in range(depth)]


def plain_vit(t: Tensors, images: Tensor, heads: int, depth: int) -> Tensor:
    """MAE's encoder, DeiT, DINO, MoCo-v3, iBOT: tokens before the final norm."""
    tokens = [t[name] for name in ("cls_token", "dist_token") if name in t]
    return run(with_prefix(patches(images, t), *tokens) + t["pos_embed"], t, heads, numbered(depth))


def deit3(t: Tensors, images: Tensor, heads: int, depth: int) -> Tensor:
    """DeiT III: positions of the patches only, LayerScale."""
    x = with_prefix(patches(images, t) + t["pos_embed"], t["cls_token"])
    return norm(run(x, t, heads, numbered(depth), scales=("gamma_1", "gamma_2")), t, "norm")


def dinov2(t: Tensors, images: Tensor, heads: int, blocks: Sequence[str], *, gated: bool) -> Tensor:
    """DINOv2: the class token has a position, registers come after it and have none."""
    x = with_prefix(patches(images, t), t["cls_token"]) + t["pos_embed"]
    registers = [t["register_tokens"]] if "register_tokens" in t else []
    x = torch.cat([x[:, :1], with_prefix(x[:, 1:], *registers)], dim=1)
    x = run(x, t, heads, blocks, scales=("ls1.gamma", "ls2.gamma"), ffn=packed_swiglu if gated else mlp)
    return norm(x, t, "norm")


def dinov3(t: Tensors, images: Tensor, heads: int, depth: int, grid: tuple[int, int]) -> Tensor:
    """DINOv3: rotary positions of the patches, no bias on the keys, norms with eps 1e-5."""
    x = with_prefix(patches(images, t), t["cls_token"], t["storage_tokens"])
    prefix = 1 + t["storage_tokens"].shape[1]
    rows, columns = (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1 for n in grid)
    places = torch.cartesian_prod(rows, columns)
    angles = (2 * math.pi * places[:, :, None] / t["rope_embed.periods"]).flatten(1).repeat(1, 2)

    def rotate(q: Tensor) -> Tensor:
        half = q.shape[-1] // 2
        turned = torch.cat([-q[..., half:], q[..., :half]], dim=-1)
        rotated = q * angles.cos() + turned * angles.sin()
        return torch.cat([q[:, :, :prefix], rotated[:, :, prefix:]], dim=2)

    angles = torch.cat([torch.zeros(prefix, angles.shape[1]), angles])
    for b in numbered(depth):
        y = norm(x, t, f"{b}norm1", 1e-5) @ t[f"{b}attn.qkv.weight"].T
        y = y + t[f"{b}attn.qkv.bias"] * t[f"{b}attn.qkv.bias_mask"]
        q, k, v = (split(part, heads) for part in y.chunk(3, -1))
        y = linear(softmax_attention(rotate(q), rotate(k), v), t, f"{b}attn.proj")
        x = x + t[f"{b}ls1.gamma"] * y
        y = norm(x, t, f"{b}norm2", 1e-5)
        if f"{b}mlp.w1.weight" in t:
            gate = linear(y, t, f"{b}mlp.w1")
            y = linear(gate * torch.sigmoid(gate) * linear(y, t, f"{b}mlp.w2"), t, f"{b}mlp.w3")
        else:
            y = mlp(y, t, f"{b}mlp")
        x = x + t[f"{b}ls2.gamma"] * y
    return norm(x, t, "norm", 1e-5)


def relative_bias(table: Tensor, side: int) -> Tensor:
    """(H, N, N) from a table of (2 side - 1)² offsets and three more: from, to, and of the class token."""
    reach = 2 * side - 1
    index = torch.empty(side * side + 1, side * side + 1, dtype=torch.long)
    index[0, :], index[:, 0], index[0, 0] = reach**2, reach**2 + 1, reach**2 + 2
    for i in range(side * side):
        for j in range(side * side):
            rows, columns = i // side - j // side, i % side - j % side
            index[1 + i, 1 + j] = (rows + side - 1) * reach + columns + side - 1
    return table[index].permute(2, 0, 1)


def beit(t: Tensors, images: Tensor, heads: int, depth: int, side: int) -> Tensor:
    """BEiT and BEiTv2: biases on queries and values, relative positions, LayerScale; before the final norm."""
    x = with_prefix(patches(images, t), t["cls_token"]) + t.get("pos_embed", torch.zeros(()))
    for b in numbered(depth):
        query, value = t[f"{b}attn.q_bias"], t[f"{b}attn.v_bias"]
        y = norm(x, t, f"{b}norm1") @ t[f"{b}attn.qkv.weight"].T
        y = y + torch.cat([query, torch.zeros_like(query), value])
        q, k, v = (split(part, heads) for part in y.chunk(3, -1))
        names = (f"{b}attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table")
        bias = sum(relative_bias(t[name], side) for name in names if name in t)
        x = x + t[f"{b}gamma_1"] * linear(softmax_attention(q, k, v, bias), t, f"{b}attn.proj")
        x = x + t[f"{b}gamma_2"] * mlp(norm(x, t, f"{b}norm2"), t, f"{b}mlp")
    return x


def flax_dense(x: Tensor, t: Tensors, name: str) -> Tensor:
    return x @ t[f"{name}/kernel"] + t[f"{name}/bias"]


def flax_norm(x: Tensor, t: Tensors, name: str) -> Tensor:
    return layer_norm(x, t[f"{name}/scale"], t[f"{name}/bias"])


def flax_mlp(x: Tensor, t: Tensors, name: str) -> Tensor:
    return flax_dense(tanh_gelu(flax_dense(x, t, f"{name}/Dense_0")), t, f"{name}/Dense_1")


def flax_attention(query: Tensor, x: Tensor, t: Tensors, name: str) -> Tensor:
    """Kernels (C, H, D) in, (H, D, C) out."""

    def project(y: Tensor, part: str) -> Tensor:
        return (
            torch.einsum("bnc,chd->bhnd", y, t[f"{name}/{part}/kernel"]) + t[f"{name}/{part}/bias"][:, None]
        )

    q, k, v = project(query, "query"), project(x, "key"), project(x, "value")
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhnd,hdc->bnc", weights @ v, t[f"{name}/out/kernel"]) + t[f"{name}/out/bias"]


def flax_vit(t: Tensors, images: Tensor, depth: int, *, old: bool) -> Tensor:
    """vit_jax (`old`: the class token has a position) and big_vision; NHWC images in the source, NCHW here."""
    kernel = t["embedding/kernel"].permute(3, 2, 0, 1)
    cut = functional.unfold(images, kernel.shape[-2:], stride=kernel.shape[-2:]).transpose(1, 2)
    x = cut @ kernel.flatten(1).T + t["embedding/bias"]
    tokens = [t["cls"]] if "cls" in t else []
    if old:
        x = with_prefix(x, *tokens) + t["Transformer/posembed_input/pos_embedding"]
    else:
        x = with_prefix(x + t["pos_embedding"], *tokens)
    second, attend, feed = ("LayerNorm_2", "_1", "_3") if old else ("LayerNorm_1", "_0", "_0")
    for i in range(depth):
        b = f"Transformer/encoderblock_{i}"
        y = flax_norm(x, t, f"{b}/LayerNorm_0")
        x = x + flax_attention(y, y, t, f"{b}/MultiHeadDotProductAttention{attend}")
        x = x + flax_mlp(flax_norm(x, t, f"{b}/{second}"), t, f"{b}/MlpBlock{feed}")
    return flax_norm(x, t, "Transformer/encoder_norm")


def map_head(x: Tensor, t: Tensors) -> Tensor:
    """Attention pooling with one learned query: (B, C)."""
    probe = t["MAPHead_0/probe"].expand(len(x), -1, -1)
    x = flax_attention(probe, x, t, "MAPHead_0/MultiHeadDotProductAttention_0")
    return (x + flax_mlp(flax_norm(x, t, "MAPHead_0/LayerNorm_0"), t, "MAPHead_0/MlpBlock_0"))[:, 0]
