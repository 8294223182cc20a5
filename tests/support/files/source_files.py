"""Random tensors under the names that research repositories give them: what their files hold, made small."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, SIDE = 16, 2, 2, 4, 4
"""Of every file here: 16x16 images in 4x4 patches."""
CLASSES = 5
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1)


def layer(name: str, out: int, width: int = WIDTH) -> Tensors:
    return {f"{name}.weight": random(out, width), f"{name}.bias": random(out)}


def norm(name: str) -> Tensors:
    return {f"{name}.weight": random(WIDTH), f"{name}.bias": random(WIDTH)}


def block(b: str) -> Tensors:
    return {
        **norm(f"{b}norm1"), **layer(f"{b}attn.qkv", 3 * WIDTH), **layer(f"{b}attn.proj", WIDTH),
        **norm(f"{b}norm2"), **layer(f"{b}mlp.fc1", 4 * WIDTH), **layer(f"{b}mlp.fc2", WIDTH, 4 * WIDTH),
    }  # fmt: skip


def patch_embed() -> Tensors:
    return {"patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": random(WIDTH)}


def plain(*, final: str = "norm", classes: int = 0, prefix: int = 1) -> Tensors:
    """MAE's encoder, DINO's and iBOT's backbones, DeiT with `classes`."""
    tensors = {
        "cls_token": random(1, 1, WIDTH), "pos_embed": random(1, prefix + SIDE**2, WIDTH), **patch_embed(),
        **norm(final),
    }  # fmt: skip
    for i in range(DEPTH):
        tensors |= block(f"blocks.{i}.")
    return tensors | (layer("head", classes) if classes else {})


def mae() -> Tensors:
    decoder = {
        "mask_token": random(1, 1, 8), "decoder_pos_embed": random(1, 17, 8), **layer("decoder_embed", 8),
    }  # fmt: skip
    for name in ("decoder_blocks.0.attn.qkv", "decoder_norm", "decoder_pred"):
        decoder |= layer(name, 8, 8)
    return {**plain(), **decoder}


def distilled() -> Tensors:
    heads = {**layer("head", CLASSES), **layer("head_dist", CLASSES)}
    return {**plain(prefix=2), "dist_token": random(1, 1, WIDTH), **heads}


def deit3() -> Tensors:
    scales = {f"blocks.{i}.gamma_{j}": random(WIDTH) for i in range(DEPTH) for j in (1, 2)}
    return {**plain(classes=CLASSES, prefix=0), **scales}


def moco_head(name: str) -> Tensors:
    """Three dense layers, each with a batch norm behind it, as MoCo-v3 has them."""
    tensors = {f"{name}.{i}.weight": random(8, WIDTH) for i in (0, 3, 6)}
    for i in (1, 4, 7):
        tensors |= {f"{name}.{i}.running_mean": random(8), f"{name}.{i}.num_batches_tracked": torch.tensor(3)}
    return tensors


def dino_head(name: str) -> Tensors:
    return {
        **layer(f"{name}.mlp.0", 8),
        f"{name}.last_layer.weight_g": random(8, 1),
        f"{name}.last_layer.weight_v": random(8, 8),
    }


def dinov2(blocks: list[str], *, registers: int, gated: bool = False) -> Tensors:
    tensors = {
        "cls_token": random(1, 1, WIDTH), "pos_embed": random(1, 1 + SIDE**2, WIDTH),
        "mask_token": random(1, WIDTH), **patch_embed(), **norm("norm"),
    }  # fmt: skip
    if registers:
        tensors["register_tokens"] = random(1, registers, WIDTH)
    for b in blocks:
        tensors |= {**block(b), f"{b}ls1.gamma": random(WIDTH), f"{b}ls2.gamma": random(WIDTH)}
        if gated:
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                del tensors[f"{b}mlp.{name}"]
            tensors |= {**layer(f"{b}mlp.w12", 64), **layer(f"{b}mlp.w3", WIDTH, 32)}
    return tensors


def dinov3(*, gated: bool = False) -> Tensors:
    periods = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    tensors = {
        "cls_token": random(1, 1, WIDTH), "storage_tokens": random(1, 4, WIDTH), "mask_token": random(1, WIDTH),
        "rope_embed.periods": periods, **patch_embed(), **norm("norm"),
    }  # fmt: skip
    mask = torch.ones(3, WIDTH)
    mask[1] = 0
    for b in (f"blocks.{i}." for i in range(DEPTH)):
        tensors |= {**block(b), f"{b}ls1.gamma": random(WIDTH), f"{b}ls2.gamma": random(WIDTH)}
        tensors[f"{b}attn.qkv.bias_mask"] = mask.flatten()
        if gated:
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                del tensors[f"{b}mlp.{name}"]
            tensors |= layer(f"{b}mlp.w1", 24) | layer(f"{b}mlp.w2", 24) | layer(f"{b}mlp.w3", WIDTH, 24)
    return tensors


def beit(*, shared: bool, final: str, classes: int = 0, positions: bool = False) -> Tensors:
    tensors = {"cls_token": random(1, 1, WIDTH), **patch_embed(), **norm(final)}
    offsets = (2 * SIDE - 1) ** 2 + 3
    index = torch.zeros(SIDE**2 + 1, SIDE**2 + 1, dtype=torch.long)
    for i in range(DEPTH):
        b = f"blocks.{i}."
        tensors |= block(b)
        del tensors[f"{b}attn.qkv.bias"]
        tensors |= {
            f"{b}{name}": random(WIDTH) for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")
        }
        if not shared:
            tensors[f"{b}attn.relative_position_bias_table"] = random(offsets, HEADS)
            tensors[f"{b}attn.relative_position_index"] = index
    if shared:
        tensors["rel_pos_bias.relative_position_bias_table"] = random(offsets, HEADS)
        tensors["rel_pos_bias.relative_position_index"] = index
    if positions:
        tensors["pos_embed"] = random(1, 1 + SIDE**2, WIDTH)
    if classes:
        return tensors | layer("head", classes)
    return {**tensors, "mask_token": random(1, 1, WIDTH), **layer("lm_head", 8)}


def flax_layer(name: str, *kernel: int, bias: tuple[int, ...] | None = None) -> Tensors:
    return {f"{name}/kernel": random(*kernel), f"{name}/bias": random(*(bias or kernel[-1:]))}


def flax_norm(name: str) -> Tensors:
    return {f"{name}/scale": random(WIDTH), f"{name}/bias": random(WIDTH)}


def flax_attention(name: str) -> Tensors:
    heads = (HEADS, WIDTH // HEADS)
    tensors = flax_layer(f"{name}/out", *heads, WIDTH)
    for part in ("query", "key", "value"):
        tensors |= flax_layer(f"{name}/{part}", WIDTH, *heads, bias=heads)
    return tensors


def flax_mlp(name: str) -> Tensors:
    return {
        **flax_layer(f"{name}/Dense_0", WIDTH, 4 * WIDTH),
        **flax_layer(f"{name}/Dense_1", 4 * WIDTH, WIDTH),
    }


def flax(*, old: bool, cls: bool, classes: int = 0, pooled: bool = False) -> Tensors:
    """vit_jax (`old`) or big_vision, with a class token, a mean over tokens, or SigLIP's pooling."""
    second, attend, feed = ("LayerNorm_2", "_1", "_3") if old else ("LayerNorm_1", "_0", "_0")
    position = "Transformer/posembed_input/pos_embedding" if old else "pos_embedding"
    tensors = {
        **flax_layer("embedding", PATCH, PATCH, 3, WIDTH),
        position: random(1, SIDE**2 + (old and cls), WIDTH),
        **flax_norm("Transformer/encoder_norm"),
    }
    for b in (f"Transformer/encoderblock_{i}" for i in range(DEPTH)):
        tensors |= flax_norm(f"{b}/LayerNorm_0") | flax_norm(f"{b}/{second}")
        tensors |= flax_attention(f"{b}/MultiHeadDotProductAttention{attend}") | flax_mlp(
            f"{b}/MlpBlock{feed}"
        )
    if cls:
        tensors["cls"] = random(1, 1, WIDTH)
    if pooled:
        tensors |= {"MAPHead_0/probe": random(1, 1, WIDTH), **flax_norm("MAPHead_0/LayerNorm_0")}
        tensors |= flax_attention("MAPHead_0/MultiHeadDotProductAttention_0") | flax_mlp(
            "MAPHead_0/MlpBlock_0"
        )
    return tensors | (flax_layer("head", WIDTH, classes) if classes else {})


def stacked(tensors: Tensors) -> Tensors:
    """The blocks on each other, as a scan over layers leaves them."""
    kept = {key: tensor for key, tensor in tensors.items() if "encoderblock_" not in key}
    for key in [key for key in tensors if "encoderblock_0/" in key]:
        layers = [tensors[key.replace("encoderblock_0/", f"encoderblock_{i}/")] for i in range(DEPTH)]
        kept[key.replace("encoderblock_0/", "encoderblock/")] = torch.stack(layers)
    return kept
