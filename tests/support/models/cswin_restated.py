"""CSwin and AttnZero's CSwin restated from their descriptions: plain functions of a state dict under published names.

Written apart from the package, stripe by stripe and in float64. A file says nothing of heads, widths of stripes and
programs, which `Published` adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .golden import golden_state

State = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """The sizes of a published model, by stage; of its `letters` A is a stage with the program."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    splits: tuple[int, ...]
    image: int = 224
    classes: int = 1000
    letters: str = "BBBB"
    program: Callable[[Tensor, Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    def is_whole(self, stage: int) -> bool:
        """Whether the blocks of a stage have one branch."""
        return stage == len(self.depths) - 1 or self.splits[stage] == self.image >> (stage + 2)


SMALL, BIG = (2, 4, 8, 16), (2, 4, 32, 2)
CSWIN = {
    "cswin_tiny": Published(64, (1, 2, 21, 1), SMALL, (1, 2, 7, 7)),
    "cswin_small": Published(64, BIG, SMALL, (1, 2, 7, 7)),
    "cswin_base": Published(96, BIG, (4, 8, 16, 32), (1, 2, 7, 7)),
    "cswin_large": Published(144, BIG, (6, 12, 24, 24), (1, 2, 7, 7)),
}


def published_shapes(given: Published) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a published file."""
    first = given.width
    shapes: dict[str, tuple[int, ...]] = {"stage1_conv_embed.0.weight": (first, 3, 7, 7)}
    vectors = {"stage1_conv_embed.0.bias": first, "stage1_conv_embed.2.weight": first}
    vectors["stage1_conv_embed.2.bias"] = first
    for stage, depth in enumerate(given.depths):
        c = first << stage
        if stage:
            shapes[f"merge{stage}.conv.weight"] = (c, c // 2, 3, 3)
            vectors |= {f"merge{stage}.{name}": c for name in ("conv.bias", "norm.weight", "norm.bias")}
        branches = 1 if given.is_whole(stage) else 2
        for block in range(depth):
            name = f"stage{stage + 1}.{block}"
            linear = {"qkv": (3 * c, c), "proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
            shapes |= {f"{name}.{part}.weight": shape for part, shape in linear.items()}
            vectors |= {f"{name}.{part}.bias": shape[0] for part, shape in linear.items()}
            vectors |= {f"{name}.norm{i}.{kind}": c for i in (1, 2) for kind in ("weight", "bias")}
            for branch in range(branches):
                shapes[f"{name}.attns.{branch}.get_v.weight"] = (c // branches, 1, 3, 3)
                vectors[f"{name}.attns.{branch}.get_v.bias"] = c // branches
    last = first << (len(given.depths) - 1)
    shapes["head.weight"] = (given.classes, last)
    vectors |= {"norm.weight": last, "norm.bias": last, "head.bias": given.classes}
    return {**shapes, **{name: (size,) for name, size in vectors.items()}}


def published_state(given: Published) -> State:
    """Return drawn weights of a published model under its own names."""
    return golden_state({name: torch.empty(shape) for name, shape in published_shapes(given).items()})


def logits(given: Published, state: State, images: Tensor) -> Tensor:
    """Return the logits of images (B, 3, H, W) in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    maps = feature_maps(given, state, images.double())
    tokens = _norm(state, "norm", maps[-1].flatten(2).transpose(1, 2))
    return _linear(state, "head", tokens.mean(1))


def feature_maps(given: Published, state: State, x: Tensor) -> list[Tensor]:
    """Return the map (B, C, H, W) of each stage."""
    maps = []
    for stage, depth in enumerate(given.depths):
        if stage:
            x = F.conv2d(x, state[f"merge{stage}.conv.weight"], state[f"merge{stage}.conv.bias"], 2, 1)
            norm = f"merge{stage}.norm"
        else:
            x = F.conv2d(x, state["stage1_conv_embed.0.weight"], state["stage1_conv_embed.0.bias"], 4, 2)
            norm = "stage1_conv_embed.2"
        height, width = x.shape[2:]
        tokens = _norm(state, norm, x.flatten(2).transpose(1, 2))
        for block in range(depth):
            tokens = _block(given, state, stage, f"stage{stage + 1}.{block}", tokens, (height, width))
        x = tokens.transpose(1, 2).reshape(len(x), -1, height, width)
        maps.append(x)
    return maps


def _block(given: Published, state: State, stage: int, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = _linear(state, f"{name}.qkv", _norm(state, f"{name}.norm1", x)).chunk(3, -1)
    heads, split = given.heads[stage], given.splits[stage]
    if given.is_whole(stage):
        program = given.program if given.letters[stage] == "A" else None
        out = _branch(state, f"{name}.attns.0.get_v", (q, k, v), heads, grid, grid, program or _softmax)
    else:
        c, outs = q.shape[2] // 2, []
        for branch, stripe in enumerate(((grid[0], split), (split, grid[1]))):
            parts = tuple(t[:, :, branch * c : (branch + 1) * c] for t in (q, k, v))
            outs.append(
                _branch(state, f"{name}.attns.{branch}.get_v", parts, heads // 2, grid, stripe, _softmax)
            )
        out = torch.cat(outs, 2)
    x = x + _linear(state, f"{name}.proj", out)
    hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", x)))
    return x + _linear(state, f"{name}.mlp.fc2", hidden)


def _branch(
    state: State,
    lepe: str,
    parts: tuple[Tensor, ...],
    heads: int,
    grid: tuple[int, int],
    stripe: tuple[int, int],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attend within each stripe of the grid, padded with zeros by half on each side, and convolve its values."""
    (height, width), (rows, columns) = grid, stripe
    more = (-height % rows, -width % columns)
    top, left = more[0] // 2, more[1] // 2
    batch, _, c = parts[0].shape
    q, k, v = (
        F.pad(t.reshape(batch, height, width, c), (0, 0, left, more[1] - left, top, more[0] - top))
        for t in parts
    )
    out = torch.zeros_like(q)
    for y in range(0, height + more[0], rows):
        for x in range(0, width + more[1], columns):
            place = (slice(None), slice(y, y + rows), slice(x, x + columns))
            by_head = (t[place].reshape(batch, rows * columns, heads, -1).transpose(1, 2) for t in (q, k, v))
            attended = attend(*by_head).transpose(1, 2).reshape(batch, rows, columns, c)
            image = v[place].permute(0, 3, 1, 2)
            local = F.conv2d(image, state[f"{lepe}.weight"], state[f"{lepe}.bias"], padding=1, groups=c)
            out[place] = attended + local.permute(0, 2, 3, 1)
    return out[:, top : top + height, left : left + width].reshape(batch, height * width, c)


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1) @ v


def trial_105(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O = Q * L2c(L2c(Q) Z(mm(V)' phi(K))), with statistics of everything that is given: for one image at a time."""
    scaled = (v - v.min()) / (v.max() - v.min() + 1e-9)
    mixed = scaled.transpose(2, 3) @ (F.elu(k) + 1)
    mixed = (mixed - mixed.mean()) / mixed.std()
    return q * F.normalize(F.normalize(q, dim=-1) @ mixed, dim=-1)


def trial_140(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O = L2t(Q) + L2c(|V| sigma(phi(K)' V d^-1/2)')."""
    mixed = (F.elu(k) + 1).transpose(2, 3) @ v * v.shape[3] ** -0.5
    return F.normalize(q, dim=2) + F.normalize(v.abs() @ mixed.sigmoid().transpose(2, 3), dim=-1)


WHOLE = (56, 28, 7, 7)
ATTNZERO = {
    f"attnzero_cswin_{size}{trial}": Published(
        width, depths, heads, WHOLE, letters="AABB", program={"": trial_105, "_140": trial_140}[trial]
    )
    for trial in ("", "_140")
    for size, width, depths, heads in (
        ("t", 64, (2, 4, 18, 1), SMALL),
        ("s", 64, (3, 6, 29, 2), SMALL),
        ("b", 96, (3, 6, 29, 2), (4, 8, 16, 32)),
    )
}


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
