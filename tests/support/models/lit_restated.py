"""LIT-S, M and B and LITv2 restated from their papers, as functions of a state dict under the published names.

LIT is arXiv:2105.14217, LITv2 is arXiv:2205.13213. Shape suffixes: B batch, H and W the grid (h and w after a merge),
N tokens, C channels, K heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Published:
    """A published model; the heads are those of stages 3 and 4."""

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int]
    is_second: bool
    classes: int = 1000
    image: int = 224

    @property
    def windows(self) -> tuple[int, int]:
        """Return the windows of HiLo in stages 3 and 4."""
        return 2, 1


PUBLISHED = {
    "lit_s": Published(96, (2, 2, 6, 2), (12, 24), False),
    "lit_m": Published(96, (2, 2, 18, 2), (12, 24), False),
    "lit_b": Published(128, (2, 2, 18, 2), (16, 32), False),
    "litv2_s": Published(96, (2, 2, 6, 2), (12, 24), True),
    "litv2_m": Published(96, (2, 2, 18, 2), (12, 24), True),
    "litv2_b": Published(128, (2, 2, 18, 2), (16, 32), True),
}


def published_shapes(model: Published) -> dict[str, Tensor]:
    """Return the published names with empty tensors, and with the index of each table of relative positions."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    state: dict[str, Tensor] = {}
    layer("patch_embed.proj", model.width, 3, 4, 4)
    layer("patch_embed.norm", model.width)
    for stage in range(4):
        width = model.width * 2**stage
        for place in range(model.depths[stage]):
            block = f"layers.{stage}.blocks.{place}"
            if stage >= 2:
                layer(f"{block}.norm1", width)
                heads, side = model.heads[stage - 2], model.image // 4 // 2**stage
                if model.is_second:
                    low = width // heads * low_heads(heads, model.windows[stage - 2])
                    layer(f"{block}.attn.l_q", low, width)
                    layer(f"{block}.attn.l_kv", 2 * low, width)
                    layer(f"{block}.attn.l_proj", low, low)
                    if low < width:
                        layer(f"{block}.attn.h_qkv", 3 * (width - low), width)
                        layer(f"{block}.attn.h_proj", width - low, width - low)
                else:
                    shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * side - 1) ** 2, heads)
                    state[f"{block}.attn.relative_position_index"] = relative_index(side, side)
                    layer(f"{block}.attn.qkv", 3 * width, width)
                    layer(f"{block}.attn.proj", width, width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.mlp.fc1", 4 * width, width)
            if model.is_second:
                layer(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            layer(f"{block}.mlp.fc2", width, 4 * width)
        if stage < 3:
            merge = f"layers.{stage}.downsample"
            layer(f"{merge}.dconv", 2 * width, width, 2, 2)
            layer(f"{merge}.dconv.conv_offset", 8, width, 2, 2)
            layer(f"{merge}.norm_layer", 2 * width)
            shapes[f"{merge}.norm_layer.running_mean"] = shapes[f"{merge}.norm_layer.running_var"] = (
                2 * width,
            )
            state[f"{merge}.norm_layer.num_batches_tracked"] = torch.tensor(0)
    layer("norm", 8 * model.width)
    layer("head", model.classes, 8 * model.width)
    return state | {key: torch.empty(shape) for key, shape in shapes.items()}


def ti_shapes() -> dict[str, Tensor]:
    """Return the published names of LIT-Ti with empty tensors."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 512)}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    widths, tokens = (64, 128, 320, 512), (3136, 784, 196, 50)
    layer("patch_embed1.proj", 64, 3, 4, 4)
    layer("patch_embed1.norm", 64)
    for stage, (width, depth, ratio) in enumerate(zip(widths, (3, 4, 6, 3), (8, 8, 4, 4), strict=True), 1):
        shapes[f"pos_embed{stage}"] = (1, tokens[stage - 1], width)
        if stage > 1:
            merge, below = f"patch_embed{stage}", widths[stage - 2]
            layer(f"{merge}.dconv", width, below, 2, 2)
            layer(f"{merge}.dconv.conv_offset", 8, below, 2, 2)
            layer(f"{merge}.norm_layer", width)
            shapes[f"{merge}.norm_layer.running_mean"] = shapes[f"{merge}.norm_layer.running_var"] = (width,)
        for block in (f"block{stage}.{place}" for place in range(depth)):
            if stage > 2:
                layer(f"{block}.norm1", width)
                layer(f"{block}.attn.qkv", 3 * width, width)
                layer(f"{block}.attn.proj", width, width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.mlp.fc1", ratio * width, width)
            layer(f"{block}.mlp.fc2", width, ratio * width)
    layer("norm", 512)
    layer("head", 1000, 512)
    counts = {f"patch_embed{i}.norm_layer.num_batches_tracked": torch.tensor(0) for i in (2, 3, 4)}
    return counts | {key: torch.empty(shape) for key, shape in shapes.items()}


def low_heads(heads: int, window: int) -> int:
    return heads if window == 1 else int(heads * 0.9)


def relative_index(rows: int, columns: int) -> Tensor:
    """Return the row of the table for each pair of tokens, (N, N)."""
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return torch.tensor(
        [[(y - v + rows - 1) * (2 * columns - 1) + x - u + columns - 1 for v, u in places] for y, x in places]
    )


def resized_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """Return the table of a square grid resampled for another one, as LIT's detectors do."""
    side = round(len(table) ** 0.5)
    image, size = table.T.reshape(1, -1, side, side), (2 * rows - 1, 2 * columns - 1)
    return F.interpolate(image, size, mode="bicubic", align_corners=False)[0].flatten(1).T


def restated_logits(model: Published, state: State, images_B3HW: Tensor) -> Tensor:
    """Return the logits in float64, (B, classes)."""
    state = {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}
    stem, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images_B3HW.double(), stem, bias, stride=4).permute(0, 2, 3, 1)
    x_BHWC = _norm(state, "patch_embed.norm", x)
    for stage in range(4):
        for place in range(model.depths[stage]):
            block = f"layers.{stage}.blocks.{place}"
            if stage >= 2:
                heads, window = model.heads[stage - 2], model.windows[stage - 2]
                normed = _norm(state, f"{block}.norm1", x_BHWC)
                attention = f"{block}.attn"
                if model.is_second:
                    x_BHWC = x_BHWC + _hilo(state, attention, normed, heads, window)
                else:
                    x_BHWC = x_BHWC + _softmax(state, attention, normed, heads)
            x_BHWC = x_BHWC + _mlp(state, f"{block}.mlp", _norm(state, f"{block}.norm2", x_BHWC))
        if stage < 3:
            x_BHWC = _merge(state, f"layers.{stage}.downsample", x_BHWC)
    return _linear(state, "head", _norm(state, "norm", x_BHWC).mean((1, 2)))


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _mlp(state: State, name: str, x_BHWC: Tensor) -> Tensor:
    hidden = _linear(state, f"{name}.fc1", x_BHWC)
    kernel = state.get(f"{name}.dwconv.dwconv.weight")
    if kernel is not None:
        height, width = hidden.shape[1:3]
        padded = F.pad(hidden, (0, 0, 1, 1, 1, 1))
        hidden = state[f"{name}.dwconv.dwconv.bias"] + sum(
            padded[:, i : i + height, j : j + width] * kernel[:, 0, i, j] for i in range(3) for j in range(3)
        )
    return _linear(state, f"{name}.fc2", _gelu(hidden))


def _attend(q_NC: Tensor, k_MC: Tensor, v_MC: Tensor, heads: int, bias_KNM: Tensor | float = 0.0) -> Tensor:
    """Return softmax attention by head over the last two axes, (..., N, C)."""
    q_KND, k_KMD, v_KMD = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q_NC, k_MC, v_MC))
    scaled = q_KND * q_KND.shape[-1] ** -0.5
    weights_KNM = (scaled @ k_KMD.transpose(-1, -2) + bias_KNM).softmax(-1)
    out: Tensor = (weights_KNM @ v_KMD).transpose(-2, -3).flatten(-2)
    return out


def _softmax(state: State, name: str, x_BHWC: Tensor, heads: int) -> Tensor:
    """Return LIT's attention over the whole grid, with a bias for each relative position."""
    rows, columns = x_BHWC.shape[1:3]
    table = state[f"{name}.relative_position_bias_table"]
    if len(table) != (2 * rows - 1) * (2 * columns - 1):
        table = resized_table(table, rows, columns)
    bias_KNN = table[relative_index(rows, columns)].permute(2, 0, 1)
    q, k, v = _linear(state, f"{name}.qkv", x_BHWC.flatten(1, 2)).chunk(3, -1)
    return _linear(state, f"{name}.proj", _attend(q, k, v, heads, bias_KNN)).reshape(x_BHWC.shape)


def _hilo(state: State, name: str, x_BHWC: Tensor, heads: int, window: int) -> Tensor:
    """Return HiLo: high heads in their windows, then low heads over the means of windows."""
    batch, height, width, channels = x_BHWC.shape
    low = low_heads(heads, window)
    rows, columns = height // window, width // window
    split = x_BHWC.reshape(batch, rows, window, columns, window, channels).transpose(2, 3)
    means = split.mean((3, 4)).flatten(1, 2)
    q = _linear(state, f"{name}.l_q", x_BHWC.flatten(1, 2))
    k, v = _linear(state, f"{name}.l_kv", means).chunk(2, -1)
    out = _linear(state, f"{name}.l_proj", _attend(q, k, v, low)).unflatten(1, (height, width))
    if low == heads:
        return out
    high = _attend(*_linear(state, f"{name}.h_qkv", split.flatten(3, 4)).chunk(3, -1), heads - low)
    joined = high.unflatten(3, (window, window)).transpose(2, 3).reshape(batch, height, width, -1)
    return torch.cat((_linear(state, f"{name}.h_proj", joined), out), -1)


def _merge(state: State, name: str, x_BHWC: Tensor) -> Tensor:
    """Return the grid after deformable token merging, batch norm and GELU, (B, h, w, C')."""
    weight, offset_weight = state[f"{name}.dconv.weight"], state[f"{name}.dconv.conv_offset.weight"]
    image = x_BHWC.permute(0, 3, 1, 2)
    offsets_B8hw = F.conv2d(image, offset_weight, state[f"{name}.dconv.conv_offset.bias"], stride=2)
    row_h1 = 2 * torch.arange(x_BHWC.shape[1] // 2)[:, None]
    column_w = 2 * torch.arange(x_BHWC.shape[2] // 2)
    out_BhwC = state[f"{name}.dconv.bias"]
    for tap in range(4):
        i, j = divmod(tap, 2)
        y_Bhw, x_Bhw = row_h1 + i + offsets_B8hw[:, 2 * tap], column_w + j + offsets_B8hw[:, 2 * tap + 1]
        out_BhwC = out_BhwC + _bilinear(x_BHWC, y_Bhw, x_Bhw) @ weight[:, :, i, j].T
    norm = f"{name}.norm_layer"
    normed = (out_BhwC - state[f"{norm}.running_mean"]) / (state[f"{norm}.running_var"] + 1e-5).sqrt()
    return _gelu(normed * state[f"{norm}.weight"] + state[f"{norm}.bias"])


def _bilinear(x_BHWC: Tensor, y_Bhw: Tensor, x_Bhw: Tensor) -> Tensor:
    """Return the image at real places, (B, h, w, C); a corner outside of it is zero."""
    height, width = x_BHWC.shape[1:3]
    batch = torch.arange(len(x_BHWC))[:, None, None]
    out = torch.zeros(())
    for rows in (y_Bhw.floor(), y_Bhw.floor() + 1):
        for columns in (x_Bhw.floor(), x_Bhw.floor() + 1):
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            share = (1 - (y_Bhw - rows).abs()) * (1 - (x_Bhw - columns).abs()) * inside
            corner = x_BHWC[batch, rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()]
            out = out + share[..., None] * corner
    return out
