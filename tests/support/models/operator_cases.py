"""Every operator with the options that change what it computes: one row a case, one table for all tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, LayerShape
from graftvit.models.layer_plan import Choice, create_operator
from graftvit.models.programs.program import FOUND
from torch import Tensor

GRIDS = [(14, 14), (16, 24), (7, 9)]
PREFIXES = [0, 1, 5]
HEADS, WIDTH = 2, 8


@dataclass(frozen=True)
class Case:
    """An operator and its options; `tolerance` multiplies the float32 and half precision tolerances."""

    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1.0
    dense: Callable[..., Tensor] | None = field(default=None, repr=False)
    """The output by the definition: `dense(operator, heads, **options)`; None if other tests compare the operator."""

    def __str__(self) -> str:
        return str(Choice(self.operator, self.options))

    def build(
        self, geometry: Geometry, dtype: torch.dtype = torch.float64, heads: int = HEADS, width: int = WIDTH
    ) -> AttentionOperator:
        """The operator with every parameter drawn at random, so that a branch that starts at zero shows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            operator = create_operator(
                Choice(self.operator, self.options), LayerShape(heads, width, geometry)
            )
            with torch.no_grad():
                for parameter in operator.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if not operator.fitted:
                few = Geometry(0, (5, 6))
                operator.fit([draw(few, torch.float32, heads=heads, width=width, seed=7)], seed=1)
        return operator.to(dtype).eval()


def draw(
    geometry: Geometry,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    heads: int = HEADS,
    width: int = WIDTH,
    size: float = 1.0,
    seed: int = 0,
) -> Heads:
    """Random projections; those of float32 are those of float64, rounded."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, heads, geometry.num_tokens, width)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)
    q, k, v = ((x * factor).to(dtype) for x, factor in ((q, size), (k, size), (v, 1.0)))
    return Heads(q, k, v, None, width**-0.5, geometry=geometry)


def identity_values(heads: Heads) -> Heads:
    """The same with V := I, whose output is the map itself."""
    q, k, _ = heads.qkv()
    eye: Tensor = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    return heads.with_qkv(q, k, eye)


def check_against_map(operator: Any, heads: Heads) -> None:
    """Compare the output and its gradients with those of the dense map; twice, as a backward pass changes no input."""
    inputs = [x.requires_grad_() for x in heads.qkv()]
    out, wanted, upstream = (
        operator.attend(heads), operator.matrix(heads) @ inputs[2], torch.randn_like(inputs[2]),
    )  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    first, found = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, found)), "the backward pass changed what it read"
    for gradient, dense in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-7, atol=1e-9)


def coarse(geometry: Geometry, cells: tuple[int, int]) -> Heads:
    """Keys and values that are the same in each cell of a grid which the cells divide."""
    heads = draw(geometry, seed=4)
    q, k, v = heads.qkv()
    (rows, columns), (height, width) = cells, geometry.grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cell = (y * rows // height * columns + x * columns // width).flatten()
    first = torch.arange(geometry.num_prefix)
    return heads.with_qkv(q, *(t[:, :, torch.cat((first, geometry.num_prefix + cell))] for t in (k, v)))


# The definitions of operators, one query at a time or with a dense mask.


def dense_softmax(_: Any, heads: Heads) -> Tensor:
    q, k, v = heads.qkv()
    return (heads.scale * q @ k.transpose(2, 3)).softmax(-1) @ v


def dense_manhattan(operator: Any, heads: Heads) -> Tensor:
    (q, k, v), (prefix, grid) = heads.qkv(), (heads.tokens().num_prefix, heads.tokens().grid)
    logits = heads.scale * q @ k.transpose(2, 3)
    for i, j in itertools.product(range(grid[0] * grid[1]), repeat=2):
        distance = abs(i // grid[1] - j // grid[1]) + abs(i % grid[1] - j % grid[1])
        logits[:, :, prefix + i, prefix + j] += operator.log_decay[:, 0, 0] * distance
    return logits.softmax(-1) @ v


def dense_difference(operator: Any, heads: Heads) -> Tensor:
    q, k, v = heads.qkv()
    first, second = ((heads.scale * x @ k.mT).softmax(-1) for x in (q, q @ operator.weight))
    return (first - operator.amount * second) @ v


def dense_uniform(_: Any, heads: Heads) -> Tensor:
    return heads.values().mean(2, keepdim=True).expand_as(heads.values())


def same_window(a: int, b: int, length: int, window: int, dilation: int) -> bool:
    """Equal residues, and equal windows where the positions of a residue are dealt out as evenly as can be."""
    if a % dilation != b % dilation:
        return False
    size = len(range(a % dilation, length, dilation))
    count = -(-size // window)
    sizes = [size // count + (i < size % count) for i in range(count)]
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    return len({next(i for i, end in enumerate(ends) if x // dilation < end) for x in (a, b)}) == 1


def is_near(a: int, b: int, length: int, window: int, dilation: int) -> bool:
    """b is one of the `window` positions around a, moved inwards at the ends."""
    positions = list(range(a % dilation, length, dilation))
    first = min(max(a // dilation - window // 2, 0), max(len(positions) - window, 0))
    return b in positions[first : first + window]


def dense_local(
    _: Any, heads: Heads, window: int = 7, dilation: int = 1, *, sees: Callable[..., bool] = same_window
) -> Tensor:
    """softmax(s q·k) over the patches that a patch sees along both sides; a prefix token sees all, and all see it."""
    geometry = heads.tokens()
    (height, width), prefix = geometry.grid, geometry.num_prefix
    mask = torch.ones(geometry.num_tokens, geometry.num_tokens, dtype=torch.bool)
    for i in range(height * width):
        for j in range(height * width):
            mask[prefix + i, prefix + j] = sees(i // width, j // width, height, window, dilation) and sees(
                i % width, j % width, width, window, dilation
            )
    q, k, v = heads.qkv()
    logits = (heads.scale * q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


dense_near = partial(dense_local, sees=is_near)
dense_dilated = partial(dense_local, dilation=2)


def dense_hilo(_: Any, heads: Heads, alpha: float = 0.9, window: int = 2) -> Tensor:
    """Return the output one query at a time, from the paper's definition."""
    q, k, v = heads.qkv()
    geometry, out = heads.tokens(), torch.zeros_like(v)
    prefix, (rows, columns) = geometry.num_prefix, geometry.grid
    high = 0 if window == 1 else v.shape[1] - int(v.shape[1] * alpha)
    cells = [(y // window, x // window) for y in range(rows) for x in range(columns)]
    members = {
        cell: [prefix + i for i, each in enumerate(cells) if each == cell] for cell in sorted(set(cells))
    }
    for head in range(v.shape[1]):
        pooled_k, pooled_v = (
            torch.stack(
                [x[:, head, i] for i in range(prefix)] + [x[:, head, m].mean(1) for m in members.values()], 1
            )
            for x in (k, v)
        )
        for query in range(geometry.num_tokens):
            keys, values = k[:, head], v[:, head]
            if query >= prefix and head < high:
                near = [*range(prefix), *members[cells[query - prefix]]]
                keys, values = keys[:, near], values[:, near]
            elif query >= prefix:
                keys, values = pooled_k, pooled_v
            weights = (heads.scale * (keys @ q[:, head, query, :, None])[..., 0]).softmax(-1)
            out[:, head, query] = (weights[:, None] @ values)[:, 0]
    return out


def dense_stripes(_: Any, heads: Heads, width: int = 7, local_size: int = 3) -> Tensor:
    """Return the output one query at a time; padded keys of a stripe count with weight exp(0), and add nothing."""
    (q, k, v), geometry = heads.qkv(), heads.tokens()
    prefix, grid, num_heads = geometry.num_prefix, geometry.grid, v.shape[1]
    out, columns_first = torch.zeros_like(v), -(-num_heads // 2)
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    for head in range(num_heads):
        axis = 1 if head < columns_first else 0  # along which stripes lie side by side
        size = min(width, grid[axis])
        before = (-grid[axis] % size) // 2
        stripe = [(place[axis] + before) // size for place in places]
        padded = size * grid[1 - axis]
        for query in range(geometry.num_tokens):
            seen, more = list(range(geometry.num_tokens)), 0
            if query >= prefix:
                near = [prefix + i for i, each in enumerate(stripe) if each == stripe[query - prefix]]
                seen, more = [*range(prefix), *near], padded - len(near)
            logits = heads.scale * (k[:, head, seen] @ q[:, head, query, :, None])[..., 0]
            weights = logits.exp() / (logits.exp().sum(1, keepdim=True) + more)
            out[:, head, query] = (weights[:, None] @ v[:, head, seen])[:, 0]
    return out


def dense_blocks(
    operator: Any, heads: Heads, block: int = 8, share: float = 0.1, linear: str = "projected"
) -> Tensor:
    """Return the output one query at a time, from the definition."""
    (q, k, v), geometry, out = heads.qkv(), heads.tokens(), torch.zeros_like(heads.values())
    prefix, (rows, columns) = geometry.num_prefix, geometry.grid
    ends = [
        [sum(side // count + (i < side % count) for i in range(window + 1)) for window in range(count)]
        for side, count in ((rows, -(-rows // block)), (columns, -(-columns // block)))
    ]
    at = [
        tuple(next(i for i, end in enumerate(ends[axis]) if place < end) for axis, place in ((0, y), (1, x)))
        for y in range(rows)
        for x in range(columns)
    ]
    members = {name: [prefix + i for i, own in enumerate(at) if own == name] for name in sorted(set(at))}
    count = max(1, int(share * len(members)))
    for image, head in itertools.product(*map(range, q.shape[:2])):
        own_q, own_k, own_v = (x[image, head] for x in (q, k, v))
        for i in range(geometry.num_tokens):
            best = list(members)
            if i >= prefix:
                mean = own_q[members[at[i - prefix]]].mean(0)
                scores = {name: float(mean @ own_k[tokens].mean(0)) for name, tokens in members.items()}
                best = sorted(members, key=lambda name: (-scores[name], name))[:count]
            near = [*range(prefix), *(token for name in best for token in members[name])]
            exact = (heads.scale * own_k[near] @ own_q[i]).softmax(0) @ own_v[near]
            far = [token for token in range(geometry.num_tokens) if token not in near]
            out[image, head, i] = exact
            if far and linear != "none":
                weights = own_k[far].softmax(1) @ own_q[i].softmax(0)
                kernel = weights @ own_v[far] / weights.sum()
                if linear == "mixed":
                    share_of = operator.gate[head].sigmoid()
                    out[image, head, i] = (1 - share_of[0]) * exact + share_of[0] * kernel
                else:
                    out[image, head, i] = exact + kernel @ operator.projection[head]
    return out


def dense_vit3(operator: Any, heads: Heads) -> Tensor:
    """Return the output with autograd's gradients of the inner networks, one image and head at a time."""
    (q, k, v), geometry = heads.qkv(), heads.tokens()
    outs = [
        [
            _inner_matrices(operator, *(x[image, head] for x in (q, k, v)), head)
            if head < operator.matrices
            else _inner_taps(operator, *(x[image, head] for x in (q, k, v)), geometry)
            for head in range(q.shape[1])
        ]
        for image in range(q.shape[0])
    ]
    return torch.stack([torch.stack(each) for each in outs])


def _inner_matrices(operator: Any, q_ND: Tensor, k_ND: Tensor, v_ND: Tensor, head: int) -> Tensor:
    def apply(x: Tensor, linear: Tensor, gated: Tensor) -> Tensor:
        gate: Tensor = x @ gated
        return (x @ linear) * gate / (1 + (-gate).exp())

    weights = [operator.linear[head], operator.gated[head]]
    steps = _ascent((v_ND * apply(k_ND, *weights)).sum() / (3 * len(q_ND)), weights)
    first, second = (w + g / (g.square().sum(0).sqrt() + 1) for w, g in zip(weights, steps, strict=True))
    return apply(q_ND, first, second)


def _inner_taps(operator: Any, q_ND: Tensor, k_ND: Tensor, v_ND: Tensor, geometry: Geometry) -> Tensor:
    prefix, width = geometry.num_prefix, q_ND.shape[1]
    q, k, v = (x[prefix:].T.unflatten(1, geometry.grid)[None] for x in (q_ND, k_ND, v_ND))
    objective = (v * F.conv2d(k, operator.taps, padding=1, groups=width)).sum() / (3 * geometry.num_patches)
    (step,) = _ascent(objective, [operator.taps])
    taps = operator.taps + step / (step.square().sum((1, 2, 3), keepdim=True).sqrt() + 1)
    grid = F.conv2d(q, taps, padding=1, groups=width)[0].flatten(1).T
    return torch.cat([q_ND[:prefix] * taps[:, 0, 1, 1], grid])


def _ascent(objective: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(objective, weights, create_graph=True)


def dense_cores(operator: Any, heads: Heads, num_cores: int = 16) -> Tensor:
    """Return the output with the keys and values of one core at a time."""
    (q, k, v), keys, values = heads.qkv(), [], []
    for core in range(num_cores):
        weights = (heads.scale * k @ operator.cores[:, core, :, None]).softmax(2)
        keys.append((weights * k).sum(2))
        values.append((weights * v).sum(2))
    return (heads.scale * q @ torch.stack(keys, 3)).softmax(3) @ torch.stack(values, 2)


def dense_scan(operator: Any, heads: Heads) -> Tensor:
    """Return the output of the whole map, with the product of gates pair by pair."""
    (q, k, v), prefix = heads.qkv(), heads.tokens().num_prefix
    gates = (k @ operator.gate_weight + operator.gate_bias).sigmoid()[..., 0]
    k_centered = k - k.mean(2, keepdim=True)
    weights = (F.elu(q) + 1) @ (F.elu(k_centered) + 1).mT
    mask = torch.ones_like(weights)
    for i, j in itertools.product(range(prefix, q.shape[2]), repeat=2):
        seen = gates[:, :, j:i] if j < i else gates[:, :, i + 1 : j + 1]
        mask[:, :, i, j] = seen.prod(-1)
    weights = weights * mask
    out = weights / weights.sum(-1, keepdim=True) @ v
    return torch.cat((dense_softmax(None, heads)[:, :, :prefix], out[:, :, prefix:]), 2)


CASES = [
    Case("stripes", dense=dense_stripes), Case("stripes", {"width": 2, "local_size": 0}, dense=dense_stripes),
    Case("stripes", {"width": 4, "local_size": 5}, dense=dense_stripes),
    Case("hilo", dense=dense_hilo), Case("hilo", {"alpha": 0.5, "window": 3}, dense=dense_hilo),
    Case("hilo", {"alpha": 0.0, "window": 4}, dense=dense_hilo), Case("hilo", {"alpha": 1.0}, dense=dense_hilo),
    Case("hilo", {"window": 1}, dense=dense_hilo), Case("softmax", dense=dense_softmax), Case("linear"),
    Case("kernel", {"feature": "relu"}),
    Case("kernel", {"feature": "relu", "normalizer": "inline", "center": True}),
    Case("kernel", {"feature": "relu", "normalizer": "mala"}), Case("kernel", {"local": "v", "local_size": 3}),
    Case("kernel", {"local": "qk", "center": True}), Case("kernel", {"feature": "relu", "local": "dynamic"}),
    Case("kernel", {"feature": "cosine", "local": "qk", "local_size": 5}),
    Case("kernel", {"feature": "hedgehog", "num_features": 5}), Case("kernel", {"feature": "hedgehog_joint"}),
    Case("kernel", {"feature": "t2r", "num_features": 12, "normalizer": "inline"}),
    Case("kernel", {"feature": "favor", "num_features": 11}),
    Case("kernel", {"feature": "favor", "normalizer": "mala", "center": True}),
    Case("performer"), Case("hedgehog"), Case("t2r"), Case("focused"), Case("cosformer"), Case("inline"),
    Case("mala"), Case("rala"), Case("kernel", {"feature": "relu", "normalizer": "rala", "center": True}),
    Case("kernel", {"rope": True}), Case("kernel", {"feature": "nala", "normalizer": "rala", "rope": True}),
    Case("pola"), Case("nala"), Case("kernel", {"feature": "nala", "normalizer": "mala"}),
    Case("linformer"), Case("linformer", {"num_keys": 6, "sharing": "key-value"}),
    Case("linformer", {"num_keys": 6, "sharing": "layerwise", "stochastic": True}),
    Case("linformer", {"stochastic": True}),
    Case("nystrom"), Case("nystrom", {"num_landmarks": 7, "iterations": 3, "local_size": 0}),
    Case("agent"), Case("agent", {"num_agents": 7, "local_size": 0}),
    Case("window", dense=dense_local), Case("window", {"window": 4}, dense=dense_local),
    Case("neighbourhood", {"window": 5}, dense=dense_near), Case("neighbourhood", {"window": 4}, dense=dense_near),
    Case("neighbourhood", {"window": 3, "dilation": 2}, dense=dense_near),
    Case("dilated", dense=dense_dilated), Case("dilated", {"window": 3, "dilation": 3}, dense=dense_dilated),
    Case("hybrid", {"window": 4}),
    Case("hybrid", {"window": 3, "dilation": 3, "branches": "dilated+kernel", "feature": "relu"}),
    Case("hybrid", {"window": 4, "branches": "window+dilated"}),
    Case("hybrid", {"combine": "joint", "window": 4}),
    Case("hybrid", {"combine": "joint", "window": 3, "branches": "window+kernel", "feature": "relu"}),
    Case("ttt"), Case("vit3", dense=dense_vit3),
    Case("monarch"), Case("monarch", {"steps": 1}), Case("monarch", {"steps": 3, "block": 5}),
    Case("uniform", dense=dense_uniform),
    Case("program"), Case("program", {"code": "mm(softmax(nt(scale(q) k)) v)", "local_size": 0}),
    Case("program", {"code": "sub(mul(v dist(q k)) mm(l2(q) tn(minmax(k) scale(v))))"}),
    Case("program", {"prefix": "program"}), Case("program", {"bias": 2}),
    *(Case(name) for name in FOUND),
    Case("attnzero_105", {"prefix": "program", "bias": 7}),
    Case("sla", {"block": 2, "share": 0.2}, dense=dense_blocks),
    Case("sla", {"block": 3, "share": 0.34, "linear": "mixed"}, dense=dense_blocks),
    Case("topk", {"block": 2, "share": 0.3}, dense=partial(dense_blocks, linear="none")),
    Case("scan", dense=dense_scan), Case("veca", dense=dense_cores), Case("veca", {"num_cores": 3}, dense=dense_cores),
    Case("manhattan", dense=dense_manhattan), Case("differential", dense=dense_difference),
    Case("topk", {"block": 9}, dense=partial(dense_blocks, linear="none")),
    Case("hash"), Case("hash", {"bits": 5, "anchors": 7, "mode": "reference"}),
]  # fmt: skip
