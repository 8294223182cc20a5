"""AttnZero's models from the equations of its paper and code, one image at a time, in float64, under its own names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .golden import golden_state

State = dict[str, Tensor]
Size = tuple[int, int]
CLASSES = 5


@dataclass(frozen=True)
class Plain:
    """A DeiT, or an AutoFormer, whose layers have their own heads and width."""

    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    width: int = 24
    patch: int = 16
    bias: bool = False
    autoformer: bool = False


def parameters(shapes: dict[str, tuple[int, ...]]) -> State:
    return golden_state({name: torch.empty(shape) for name, shape in shapes.items()})


def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def position_tables(name: str, heads: int, width: int, grid: Size) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.na_bias": (heads, width // heads, 7, 7),
        f"{name}.ha_bias": (1, heads, grid[0], 1, width // heads),
        f"{name}.wa_bias": (1, heads, 1, grid[1], width // heads),
    }


def plain_state(model: Plain, side: int) -> State:
    """Return drawn weights of images of `side` pixels."""
    c, grid = model.width, (side // model.patch,) * 2
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, c), "pos_embed": (1, 1 + grid[0] * grid[1], c)}
    shapes |= affine("patch_embed.proj", c, 3, model.patch, model.patch)
    for i, (heads, hidden) in enumerate(zip(model.heads, model.hidden, strict=True)):
        name = f"blocks.{i}"
        first, second, mlp = ("norm1", "norm2", f"{name}.mlp")
        if model.autoformer:
            first, second, mlp = "attn_layer_norm", "ffn_layer_norm", name
        shapes |= {**affine(f"{name}.{first}", c), **affine(f"{name}.{second}", c)}
        shapes |= {**affine(f"{name}.attn.proj", c, c), **affine(f"{name}.attn.dwc", c, 1, 3, 3)}
        shapes |= {f"{name}.attn.qkv.weight": (3 * c, c)}
        shapes |= {} if model.autoformer else {f"{name}.attn.qkv.bias": (3 * c,)}
        shapes |= {**affine(f"{mlp}.fc1", hidden, c), **affine(f"{mlp}.fc2", c, hidden)}
        if model.bias:
            shapes |= position_tables(f"{name}.attn", heads, c, grid)
            shapes[f"{name}.attn.ac_bias"] = (1, heads, 1, c // heads)
    return parameters({**shapes, **affine("norm", c), **affine("head", CLASSES, c)})


@dataclass(frozen=True)
class Pyramid:
    """A PVT or a Swin."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    programs: tuple[int, ...]
    """How many of the first blocks of each stage have the program."""
    window: int = 0
    """Of the other blocks of a Swin."""
    bias: bool = False
    hidden: tuple[int, ...] = field(default=(8, 8, 4, 4))


def pvt_state(model: Pyramid, side: int) -> State:
    shapes = affine("head", CLASSES, model.widths[3])
    for stage, (c, depth) in enumerate(zip(model.widths, model.depths, strict=True), 1):
        before, patch = (model.widths[stage - 2], 2) if stage > 1 else (3, 4)
        grid = (side >> (stage + 1),) * 2
        shapes[f"pos_embed{stage}"] = (1, grid[0] * grid[1], c)
        shapes |= affine(f"patch_embed{stage}.proj", c, before, patch, patch)
        shapes |= affine(f"patch_embed{stage}.norm", c)
        for block in range(depth):
            name, hidden = f"block{stage}.{block}", model.hidden[stage - 1] * c
            shapes |= {**affine(f"{name}.attn.q", c, c), **affine(f"{name}.attn.kv", 2 * c, c)}
            shapes |= {**affine(f"{name}.attn.proj", c, c), **affine(f"{name}.attn.dwc", c, 1, 3, 3)}
            shapes |= {**affine(f"{name}.norm1", c), **affine(f"{name}.norm2", c)}
            shapes |= {**affine(f"{name}.mlp.fc1", hidden, c), **affine(f"{name}.mlp.fc2", c, hidden)}
            if model.bias:
                shapes |= position_tables(f"{name}.attn", model.heads[stage - 1], c, grid)
    return parameters(shapes)


def swin_state(model: Pyramid, side: int) -> State:
    """Return drawn weights, with the indexes and masks that its files also hold."""
    shapes = {**affine("head", CLASSES, model.widths[3]), **affine("norm", model.widths[3])}
    shapes |= {
        **affine("patch_embed.proj", model.widths[0], 3, 4, 4),
        **affine("patch_embed.norm", model.widths[0]),
    }
    rest: State = {}
    for stage, (c, depth, programs) in enumerate(
        zip(model.widths, model.depths, model.programs, strict=True)
    ):
        grid = (side >> (stage + 2),) * 2
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= {**affine(f"{name}.norm1", c), **affine(f"{name}.norm2", c)}
            shapes |= {**affine(f"{name}.attn.qkv", 3 * c, c), **affine(f"{name}.attn.proj", c, c)}
            shapes |= {**affine(f"{name}.mlp.fc1", 4 * c, c), **affine(f"{name}.mlp.fc2", c, 4 * c)}
            if block < programs:
                shapes |= affine(f"{name}.attn.dwc", c, 1, 3, 3)
                shapes |= position_tables(f"{name}.attn", model.heads[stage], c, grid) if model.bias else {}
                continue
            rows = (2 * model.window - 1) ** 2
            shapes[f"{name}.attn.relative_position_bias_table"] = (rows, model.heads[stage])
            rest[f"{name}.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * c, 4 * c)
            shapes |= affine(f"layers.{stage}.downsample.norm", 4 * c)
    return {**parameters(shapes), **rest}


# The forward passes.


def norm(state: State, name: str, x: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def convolved(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride)


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.fc2", F.gelu(linear(state, f"{name}.fc1", x)))


def positions(state: State, name: str, grid: Size) -> Tensor | float:
    """E = up(na) + ha + wa, and before it the row of the class token: (1, H, N, D)."""
    if f"{name}.na_bias" not in state:
        return 0.0
    na = F.interpolate(state[f"{name}.na_bias"], grid, mode="bilinear", align_corners=False).permute(
        0, 2, 3, 1
    )
    ha, wa = state[f"{name}.ha_bias"][0], state[f"{name}.wa_bias"][0]
    rows = [
        torch.stack([na[:, y, x] + ha[:, y, 0] + wa[:, 0, x] for x in range(grid[1])], 1)
        for y in range(grid[0])
    ]
    own = [state[f"{name}.ac_bias"][0]] if f"{name}.ac_bias" in state else []
    return torch.cat([*own, *rows], 1)[None]


def program(state: State, name: str, x: Tensor, grid: Size, heads: int, prefix: int = 0) -> Tensor:
    """O = Q * L2(L2(Q) Z(mm(V)' φ(K)) + E) of all tokens, and a convolution of the patches' V; then the projection."""
    if f"{name}.qkv.weight" in state:
        q, k, v = linear(state, f"{name}.qkv", x).chunk(3, -1)
    else:
        q, (k, v) = linear(state, f"{name}.q", x), linear(state, f"{name}.kv", x).chunk(2, -1)
    image = v[:, prefix:].transpose(1, 2).reshape(1, -1, *grid)
    q, k, u = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scaled = (u - u.min()) / (u.max() - u.min() + 1e-9)
    mixed = scaled.transpose(2, 3) @ (F.elu(k) + 1)
    mixed = (mixed - mixed.mean()) / mixed.std()
    product = F.normalize(q, dim=-1) @ mixed + positions(state, name, grid)
    out = (q * F.normalize(product, dim=-1)).transpose(1, 2).flatten(2)
    weight, bias = state[f"{name}.dwc.weight"], state[f"{name}.dwc.bias"]
    local = F.conv2d(image, weight, bias, padding=1, groups=len(weight)).flatten(2).transpose(1, 2)
    out = torch.cat([out[:, :prefix], out[:, prefix:] + local], 1)
    return linear(state, f"{name}.proj", out)


def plain_logits(state: State, model: Plain, image: Tensor) -> Tensor:
    """The class token (DeiT) or the mean of the patches (AutoFormer) goes to the classifier."""
    state, image = doubled(state), image.double()
    patches = convolved(state, "patch_embed.proj", image, model.patch)
    grid = (patches.shape[2], patches.shape[3])
    x = torch.cat([state["cls_token"], patches.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]
    epsilon = 1e-5 if model.autoformer else 1e-6
    for i, heads in enumerate(model.heads):
        name = f"blocks.{i}"
        first, second, rest = ("norm1", "norm2", f"{name}.mlp")
        if model.autoformer:
            first, second, rest = "attn_layer_norm", "ffn_layer_norm", name
        x = x + program(state, f"{name}.attn", norm(state, f"{name}.{first}", x, epsilon), grid, heads, 1)
        x = x + mlp(state, rest, norm(state, f"{name}.{second}", x, epsilon))
    x = norm(state, "norm", x, epsilon)
    return linear(state, "head", x[:, 1:].mean(1) if model.autoformer else x[:, 0])


def pvt_maps(state: State, model: Pyramid, image: Tensor) -> list[Tensor]:
    """Return the map of each stage, (1, C, h, w)."""
    state, x, maps = doubled(state), image.double(), []
    for stage, heads in enumerate(model.heads, 1):
        x = convolved(state, f"patch_embed{stage}.proj", x, 4 if stage == 1 else 2)
        grid = (x.shape[2], x.shape[3])
        x = norm(state, f"patch_embed{stage}.norm", x.flatten(2).transpose(1, 2), 1e-5)
        x = x + state[f"pos_embed{stage}"]
        for block in range(model.depths[stage - 1]):
            name = f"block{stage}.{block}"
            x = x + program(state, f"{name}.attn", norm(state, f"{name}.norm1", x, 1e-6), grid, heads)
            x = x + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x, 1e-6))
        x = x.transpose(1, 2).unflatten(2, grid)
        maps.append(x)
    return maps


def pvt_logits(state: State, model: Pyramid, image: Tensor) -> Tensor:
    return linear(doubled(state), "head", pvt_maps(state, model, image)[-1].flatten(2).mean(2))


def windowed(state: State, name: str, x: Tensor, grid: Size, heads: int, window: int, shift: int) -> Tensor:
    """softmax(Q K' / √d + B) V within windows of the shifted grid; pairs that only the shift joins see nothing."""
    rows, columns = grid
    tokens = torch.arange(rows * columns).reshape(grid)
    parts = linear(state, f"{name}.qkv", x)[0].reshape(rows * columns, 3, heads, -1).permute(1, 2, 0, 3)
    table = state[f"{name}.relative_position_bias_table"]
    out = torch.zeros_like(x[0])
    for y in range(0, rows, window):
        for z in range(0, columns, window):
            places = [
                ((a + shift) % rows, (b + shift) % columns, a + shift >= rows, b + shift >= columns)
                for a in range(y, y + window)
                for b in range(z, z + window)
            ]
            index = torch.stack([tokens[a, b] for a, b, _, _ in places])
            q, k, v = (part[:, index] for part in parts)
            a, b = (torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window))
            offsets = (a[:, None] - a + window - 1) * (2 * window - 1) + (b[:, None] - b + window - 1)
            logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + table[offsets].permute(2, 0, 1)
            crossed = torch.tensor([[one[2:] != other[2:] for other in places] for one in places])
            logits = logits - 100.0 * crossed
            out[index] = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return linear(state, f"{name}.proj", out)[None]


def swin_logits(state: State, model: Pyramid, image: Tensor) -> Tensor:
    state, x = doubled(state), convolved(doubled(state), "patch_embed.proj", image.double(), 4)
    grid = (x.shape[2], x.shape[3])
    x = norm(state, "patch_embed.norm", x.flatten(2).transpose(1, 2), 1e-5)
    for stage, (depth, heads, programs) in enumerate(
        zip(model.depths, model.heads, model.programs, strict=True)
    ):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            y = norm(state, f"{name}.norm1", x, 1e-5)
            if block < programs:
                x = x + program(state, f"{name}.attn", y, grid, heads)
            else:
                window = min(*grid, model.window)
                shift = window // 2 if block % 2 and min(grid) > window else 0
                x = x + windowed(state, f"{name}.attn", y, grid, heads, window, shift)
            x = x + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x, 1e-5))
        if stage < 3:
            four = x.unflatten(1, grid)
            corners = [four[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
            grid = (grid[0] // 2, grid[1] // 2)
            name = f"layers.{stage}.downsample"
            x = norm(state, f"{name}.norm", torch.cat(corners, -1).flatten(1, 2), 1e-5)
            x = linear(state, f"{name}.reduction", x)
    return linear(state, "head", norm(state, "norm", x, 1e-5).mean(1))


def doubled(state: State) -> State:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


# Another size of the images: its code resamples tables in float32 as it loads them.


def square_of(tokens: int) -> Size:
    return (round(tokens**0.5),) * 2


def as_image(table_1ND: Tensor, new: Size, how: str) -> Tensor:
    """Resample the rows of a square grid, (1, N, C)."""
    image = table_1ND.transpose(1, 2).unflatten(2, square_of(table_1ND.shape[1]))
    return F.interpolate(image, new, mode=how, align_corners=False).flatten(2).transpose(1, 2)


def resized(state: State, grids: Sequence[Size], how: str, window: int = 0) -> State:
    """Return the weights for stages of other grids: positions by `how`, tables of windows bicubic, rows linear."""
    out: State = {}
    for key, table in state.items():
        found = re.match(r"(layers\.|block|pos_embed)(\d)", key)
        stage = 0 if found is None else int(found[2]) - (found[1] != "layers.")
        rows, columns = grids[stage]
        out[key] = table
        if "pos_embed" in key:
            first = table.shape[1] - square_of(table.shape[1])[0] ** 2 if len(grids) > 1 else 1
            out[key] = torch.cat([table[:, :first], as_image(table[:, first:], (rows, columns), how)], 1)
        elif key.endswith("ha_bias"):
            lines = table[0, :, :, 0].transpose(1, 2)
            out[key] = F.interpolate(lines, rows, mode="linear").transpose(1, 2)[None, :, :, None]
        elif key.endswith("wa_bias"):
            lines = table[0, :, 0].transpose(1, 2)
            out[key] = F.interpolate(lines, columns, mode="linear").transpose(1, 2)[None, :, None]
        elif key.endswith("bias_table") and window:
            out[key] = as_image(table[None], (2 * window - 1,) * 2, "bicubic")[0]
    return out
