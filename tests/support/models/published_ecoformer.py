"""EcoFormer's models as they were published: their keys with drawn weights, and their equations."""

from __future__ import annotations

import re
import zlib

import numpy as np
import timm
import torch
import torch.nn.functional as F
from graftvit.models.families import sites
from torch import Tensor

BITS, ANCHORS = 16, 25
State = dict[str, Tensor]


def published_state(name: str) -> State:
    """The state dict of `pvt_v2_b*` or `twins_svt_small` with EcoFormer's attention; weights drawn by name."""
    model = timm.create_model(name)
    shapes = {
        _published(key) if "pvt" in name else key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if ".attn." not in key
    }
    for site in sites(model):
        block = f"block{site.stage + 1}.{site.place}" if "pvt" in name else site.path
        width, heads, head_dim = site.width, site.num_heads, site.head_dim
        projections = {"qkv": 3 * width} if site.stage == 3 else {"to_qk": width, "to_v": width}
        for projection, rows in {**projections, "proj": width}.items():
            shapes[f"{block}.attn.{projection}.weight"] = (rows, width)
            shapes[f"{block}.attn.{projection}.bias"] = (rows,)
        if site.stage < 3:
            fast = f"{block}.attn.fast_attention"
            shapes[f"{fast}.ksh.A"] = (heads, BITS, ANCHORS)
            shapes[f"{fast}.ksh.mvec"] = (1, heads, 1, ANCHORS)
            shapes[f"{fast}.ksh.anchor"] = (1, heads, ANCHORS, head_dim)
            shapes[f"{fast}.projection_matrix"] = (int(head_dim * np.log(head_dim)), head_dim)
    return {key: drawn(key, shape) for key, shape in shapes.items()}


def _published(key: str) -> str:
    for pattern, word in (("downsample", "patch_embed"), (r"blocks", "block"), ("norm", "norm")):
        key = re.sub(rf"^stages\.(\d)\.{pattern}\.", lambda at, word=word: f"{word}{int(at[1]) + 1}.", key)
    return re.sub(r"^patch_embed\.", "patch_embed1.", key).replace(".dwconv.", ".dwconv.dwconv.")


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of one key, from its name alone."""
    z = torch.tensor(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)).float()
    if key.endswith((".A", "projection_matrix")):
        return z
    if key.endswith("mvec"):
        return 0.5 + 0.05 * z
    if key.endswith("anchor"):
        return F.normalize(z, dim=-1)
    if key.endswith("weight"):
        return 1 + 0.1 * z if z.ndim == 1 else z / float(np.prod(shape[1:])) ** 0.5
    return 0.05 * z


def published_logits(state: State, images: Tensor, *, pvt: bool) -> Tensor:
    """The logits of the published code, in float64 and without any of this package."""
    state = {key: tensor.double() for key, tensor in state.items()}
    x = images.double()
    for stage in range(4):
        embed = f"patch_embed{stage + 1}" if pvt else f"patch_embeds.{stage}"
        blocks = f"block{stage + 1}" if pvt else f"blocks.{stage}"
        kernel = state[f"{embed}.proj.weight"].shape[-1]
        stride = (4 if stage == 0 else 2) if pvt else kernel
        x = F.conv2d(
            x, state[f"{embed}.proj.weight"], state[f"{embed}.proj.bias"], stride, kernel // 2 if pvt else 0
        )
        grid = x.shape[2:]
        x = _norm(state, f"{embed}.norm", x.flatten(2).transpose(1, 2), 1e-5)
        for index in range(
            1 + max(int(key.split(".")[2 - pvt]) for key in state if key.startswith(f"{blocks}."))
        ):
            block = f"{blocks}.{index}"
            x = x + attention(state, f"{block}.attn", _norm(state, f"{block}.norm1", x))
            x = x + _mlp(state, f"{block}.mlp", _norm(state, f"{block}.norm2", x), grid)
            if not pvt and index == 0:
                x = x + _depthwise(state, f"pos_block.{stage}.proj.0", x, grid)
        if pvt:
            x = _norm(state, f"norm{stage + 1}", x)
        if stage < 3:
            x = x.transpose(1, 2).unflatten(2, grid)
    x = x if pvt else _norm(state, "norm", x)
    return _linear(state, "head", x.mean(1))


def _norm(state: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _depthwise(state: State, name: str, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    image = x.transpose(1, 2).unflatten(2, grid)
    out = F.conv2d(image, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, groups=image.shape[1])
    return out.flatten(2).transpose(1, 2)


def _mlp(state: State, name: str, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    x = _linear(state, f"{name}.fc1", x)
    if f"{name}.dwconv.dwconv.weight" in state:
        x = _depthwise(state, f"{name}.dwconv.dwconv", x, grid)
    return _linear(state, f"{name}.fc2", F.gelu(x))


def attention(state: State, name: str, x: Tensor) -> Tensor:
    """The attention of one layer: hashed where it has hash functions, softmax elsewhere."""
    hashes = state.get(f"{name}.fast_attention.ksh.A")
    if hashes is None:
        heads = x.shape[-1] // (
            64 if state["head.weight"].shape[1] == 512 and "norm4.weight" in state else 32
        )
        q, k, v = _linear(state, f"{name}.qkv", x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        heads = len(hashes)
        qk, v = (
            _linear(state, f"{name}.{part}", x).unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("to_qk", "to_v")
        )
        u, anchors = qk / qk.norm(dim=-1, keepdim=True), state[f"{name}.fast_attention.ksh.anchor"]
        distance = (u[:, :, :, None] - anchors[:, :, None]).square().sum(-1)
        kernel = torch.exp(-distance / (2 * distance.mean((2, 3), keepdim=True)))
        z = ((kernel - state[f"{name}.fast_attention.ksh.mvec"]) @ hashes.transpose(1, 2)).sign()
        numerator = z @ (z.transpose(2, 3) @ v) + (BITS + 1) * v
        out = numerator / (z @ z.sum(2)[..., None] + x.shape[1] * (BITS + 1))
    return _linear(state, f"{name}.proj", out.transpose(1, 2).flatten(2))
