"""Public implementations of operators, on the same projections: packages of the extra `peers`.

A package's own projections are left out. Its sizes are those of our operator: features, keys, landmarks, tokens of a
window. What else differs is said where the implementation is made.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from graftvit.models.attention.agent import AgentAttention
from graftvit.models.attention.base import AttentionOperator, Heads
from graftvit.models.attention.features import rotated
from graftvit.models.attention.hybrid import HybridAttention
from graftvit.models.attention.kernel import NORMALIZERS, KernelAttention
from graftvit.models.attention.linformer import LinformerAttention
from graftvit.models.attention.local import DynamicConv
from graftvit.models.attention.monarch import MonarchAttention
from graftvit.models.attention.nystrom import NystromAttention, pseudo_inverse
from graftvit.models.attention.pooling import PooledAttention, mean_weights
from graftvit.models.attention.scan import ScanAttention
from graftvit.models.attention.sla import BlockAttention
from graftvit.models.attention.softmax import DifferentialAttention, ManhattanAttention, UniformAttention
from graftvit.models.attention.ttt import NORM_EPSILON, TTTAttention
from graftvit.models.attention.veca import CoreAttention
from graftvit.models.attention.vit3 import RATE, ViT3Attention
from graftvit.models.attention.window import TileTables, WindowAttention
from graftvit.models.errors import ConfigError, install_command
from torch import Tensor, nn

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Public(NamedTuple):
    """A public implementation: its package, and how it is made for an operator and its heads."""

    package: str
    module: str
    make: Callable[[Any, Any, Heads], tuple[Call, nn.Module]]


def public_form(
    name: str, operator: AttentionOperator, heads: Heads
) -> tuple[str, Call, list[Tensor]] | None:
    """Return the package, its function of q, k and v (B, H, N, D), and its parameters.

    Return None for an operator that is not in `PUBLIC`.

    Raises ConfigError: the package is not installed.
    """
    if name not in PUBLIC:
        return None
    public = PUBLIC[name]
    try:
        package = import_module(public.module)
    except Exception as error:  # a package may fail in any way
        missing = isinstance(error, ModuleNotFoundError) and error.name == public.module.partition(".")[0]
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise ConfigError(
            f"{name} is compared with {public.package}, which {why}; {install_command('peers')}"
        ) from error
    call, module = public.make(package, operator, heads)
    module.to(heads.known.device, heads.known.dtype).eval()
    return public.package, call, list(module.parameters())


def _linear(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """Without the centered keys."""
    module = package.LinearAttention()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return call, module


def _performer(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    width = heads.known.shape[-1]
    module = package.FastAttention(width, nb_features=operator.feature.width)
    return module, module


def _linformer(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """Without the counts of the keys."""
    _, num_heads, tokens, width = heads.known.shape
    module = package.LinformerSelfAttention(
        num_heads * width, tokens, k=operator.num_keys, heads=num_heads, dim_head=width
    )
    module.to_out = nn.Identity()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        module.to_q, module.to_k, module.to_v = (Given(x) for x in rows)
        return _heads(module(rows[0]), num_heads)

    return call, module


def _nystrom(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """With segments of the sequence as landmarks, and a convolution along it as long as a side of ours."""
    _, num_heads, _, width = heads.known.shape
    cells = operator.cells(heads.tokens())
    module = package.NystromAttention(
        num_heads * width,
        dim_head=width,
        heads=num_heads,
        num_landmarks=cells[0] * cells[1],
        pinv_iterations=operator.iterations,
        residual_conv_kernel=operator.conv.size,
    )
    module.to_out = nn.Identity()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        # The package pads its input, from which it then projects, to whole segments.
        padding = (0, 0, -q.shape[2] % module.num_landmarks, 0)
        module.to_qkv = Given(Three([F.pad(x, padding) for x in rows] if padding[2] else rows))
        return _heads(module(rows[0]), num_heads)

    return call, module


def _window(package: Any, operator: Any, heads: Heads) -> tuple[Call, nn.Module]:
    """With windows of the sequence, of as many tokens."""
    module = package.LocalAttention(
        operator.tables.window**2,
        look_backward=0,
        look_forward=0,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    return module, module


PUBLIC = {
    "linear": Public("kornia", "kornia.feature.loftr.loftr_module.linear_attention", _linear),
    "performer": Public("performer-pytorch", "performer_pytorch", _performer),
    "linformer": Public("linformer", "linformer.linformer", _linformer),
    "nystrom": Public("nystrom-attention", "nystrom_attention.nystrom_attention", _nystrom),
    "window": Public("local-attention", "local_attention", _window),
}
"""By operator with default options."""


class Three(NamedTuple):
    """Queries, keys and values in place of the tensor that a package would cut into them."""

    parts: list[Tensor]

    def chunk(self, count: int, dim: int) -> list[Tensor]:
        """Return the parts."""
        return self.parts


class Given(nn.Module):
    """A projection whose result is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        """Return what was given."""
        return self.value


def _heads(x_BNC: Tensor, num_heads: int) -> Tensor:
    x_BNHD: Tensor = x_BNC.unflatten(2, (num_heads, -1))
    return x_BNHD.transpose(1, 2)


# The equation of each operator, written down without any care for speed: what an operator has to be faster than.
#
# Each form takes an operator with its default options and heads without prefix tokens and padding, and
# returns what the operator returns (a test compares them). It uses the operator's parameters, feature map and
# convolution.

Form: TypeAlias = Callable[[Heads], Tensor]


def straight_form(operator: AttentionOperator) -> Form | None:
    """Return the form of an operator; None if the operator itself is written so, step by step."""
    for kind, form in FORMS.items():
        if isinstance(operator, kind):
            return lambda heads: _with_local(operator, heads, form(operator, heads))
    return None


def _with_local(operator: AttentionOperator, heads: Heads, out: Tensor) -> Tensor:
    conv = getattr(operator, "v_conv", None)
    local = operator.local(heads) if not isinstance(conv, DynamicConv) else _dynamic(conv, heads)
    return out if local is None else out + local


def kernel(operator: AttentionOperator, heads: Heads) -> Tensor:
    """φ(q) (φ(k)ᵀ v), divided by φ(q) · Σ φ(k), or in the form of InLine or of MALA; RALA weighs φ(k) first."""
    own = cast(KernelAttention, operator)
    q, k, v = heads.qkv()
    if own.center:
        k = k - k.mean(2, keepdim=True)
    q, k = own.feature(heads.with_qkv(q, k, v))
    if own.normalizer.weighs_keys:
        k = k * k.shape[2] * (heads.scale * q.mean(2, keepdim=True) @ k.mT).softmax(-1).mT
    if own.feature.opposed:
        halves = zip((q, q.roll(q.shape[3] // 2, 3)), v.chunk(2, -1), strict=True)
        return torch.cat([_normalized(own, heads, side, k, half) for side, half in halves], -1)
    return _normalized(own, heads, q, k, v)


def _normalized(own: KernelAttention, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = [rotated(x, own.shape.head_dim, heads.tokens()) if own.rope else x for x in (q, k)]
    products: Tensor = turned[0] @ (turned[1].mT @ v)
    sums: Tensor = q @ k.sum(2, keepdim=True).transpose(2, 3)
    if own.normalizer in (NORMALIZERS["sum"], NORMALIZERS["rala"]):
        return products / sums
    tokens, mean = v.shape[2], v.mean(2, keepdim=True)
    signed: Tensor = heads.scale * (products - sums * mean) / tokens
    if own.normalizer == NORMALIZERS["inline"]:
        return signed + mean
    return products / sums + signed


def _dynamic(conv: DynamicConv, heads: Heads) -> Tensor:
    """Convolve each image with the weights that its mean value gives."""
    v, grid = heads.values(), heads.tokens().grid
    generated = conv.generate(F.silu(conv.squeeze(v.mean(2).flatten(1))))
    images = v.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    weights = conv.static.weight + generated.unflatten(1, conv.static.weight.shape)
    pairs = zip(images, weights, strict=True)
    outs = [
        F.conv2d(image[None], each, padding=conv.static.size // 2, groups=len(image)) for image, each in pairs
    ]
    return torch.cat(outs).flatten(2).unflatten(1, v.shape[1::2]).mT


def linformer(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q (E k)ᵀ + log c) F v."""
    q, k, v = heads.qkv()
    pool_keys, pool_values = cast(LinformerAttention, operator).pooling(heads.tokens())
    counts = pool_keys.sum(-1).square() / pool_keys.square().sum(-1)
    logits = heads.scale * q @ (pool_keys @ k).transpose(2, 3) + counts.clamp_min(1).log()
    return logits.softmax(-1) @ (pool_values @ v)


def agent(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q tᵀ + log c) softmax(s t kᵀ) v with the agents t."""
    q, k, v = heads.qkv()
    means, counts = _cells(cast(AgentAttention, operator), heads)
    agents = means @ q
    gathered = (heads.scale * agents @ k.transpose(2, 3)).softmax(-1) @ v
    return (heads.scale * q @ agents.transpose(2, 3) + counts).softmax(-1) @ gathered


def nystrom(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q k̃ᵀ + log c) Z softmax(s q̃ kᵀ) v with the landmarks q̃, k̃."""
    own = cast(NystromAttention, operator)
    q, k, v = heads.qkv()
    means, counts = _cells(own, heads)
    q_marks, k_marks = means @ q, means @ k
    left, middle = ((heads.scale * x @ k_marks.transpose(2, 3) + counts).softmax(-1) for x in (q, q_marks))
    right = (heads.scale * q_marks @ k.transpose(2, 3)).softmax(-1)
    return left @ (pseudo_inverse(middle, own.iterations) @ (right @ v))


def window(operator: AttentionOperator, heads: Heads) -> Tensor:
    """Gather the tiles, attend within each by torch's fused attention, and put the tokens back."""
    return _tiles(cast(WindowAttention, operator).tables, heads)


def hybrid(operator: AttentionOperator, heads: Heads) -> Tensor:
    """Σ_b g_b A_b v with g = softmax_b(q W + β), over windows, dilated windows and a kernel."""
    own = cast(HybridAttention, operator)
    q, _ = heads.qk()
    gates = (q @ own.gate_weight + own.gate_bias).softmax(-1).unbind(-1)
    outs = [_tiles(cast(TileTables, tables), heads) for tables in own.tables]
    outs.append(kernel(cast(KernelAttention, own.kernel), heads))
    return torch.stack([gate[..., None] * out for gate, out in zip(gates, outs, strict=True)]).sum(0)


def ttt(operator: AttentionOperator, heads: Heads) -> Tensor:
    """f_{W + g}(q) with f_W(x) = (silu(x W₁) ⊙ x W₂) W₃ and g the gradient of (s/N) Σ_j v_j · f_W(k_j)."""
    own = cast(TTTAttention, operator)
    q, k, v = heads.qkv()
    grid = heads.tokens()
    k = (k - k.mean(2, keepdim=True)) / (k.var(2, correction=0, keepdim=True) + NORM_EPSILON).sqrt()
    q, k = q + own.q_conv(q, grid), k + own.k_conv(k, grid)
    v = v * heads.scale / v.shape[2]
    gate, linear, hidden = k @ own.gated, k @ own.linear, v @ own.out.mT
    sigmoid = gate.sigmoid()
    gated = own.gated + k.mT @ (hidden * linear * sigmoid * (1 + gate * (1 - sigmoid)))
    linear_weight = own.linear + k.mT @ (hidden * gate * sigmoid)
    out_weight = own.out + (gate * sigmoid * linear).mT @ v
    out: Tensor = (F.silu(q @ gated) * (q @ linear_weight)) @ out_weight
    return out


def vit3(operator: AttentionOperator, heads: Heads) -> Tensor:
    """f_{W + c(g)}(q): x W₁ ⊙ silu(x W₂), and in the last head a depthwise convolution."""
    own, (q, k, v), grid = cast(ViT3Attention, operator), heads.qkv(), heads.tokens().grid
    error = v * RATE / v.shape[2]
    q, k, v = q[:, :-1], k[:, :-1], error[:, :-1]
    gate = k @ own.gated
    sigmoid = gate.sigmoid()
    linear = k.mT @ (v * gate * sigmoid)
    gated = k.mT @ (v * (k @ own.linear) * sigmoid * (1 + gate * (1 - sigmoid)))
    linear, gated = (x / (x.norm(dim=-2, keepdim=True) + 1) for x in (linear, gated))
    out = (q @ (own.linear + linear)) * F.silu(q @ (own.gated + gated))
    queries, keys, errors = (x[:, -1].mT.unflatten(2, grid) for x in (*heads.qk(), error))
    padded = F.pad(keys, (1, 1, 1, 1))
    moved = [padded[:, :, y : y + grid[0], x : x + grid[1]] for y in range(3) for x in range(3)]
    step = torch.stack([(x * errors).sum((2, 3)) for x in moved], -1)
    taps = cast(Tensor, own.taps) + (step / (step.norm(dim=-1, keepdim=True) + 1)).unflatten(2, (1, 3, 3))
    pairs = zip(queries, taps, strict=True)
    local = torch.cat([F.conv2d(x[None], each, padding=1, groups=len(x)) for x, each in pairs])
    return torch.cat([out, local.flatten(2).mT[:, None]], 1)


def monarch(operator: AttentionOperator, heads: Heads) -> Tensor:
    """Σ_k L(j, l, k) Σ_i R(k, j, i) v(k, i): the best R for L, then the best L for R, from L = 1."""
    own = cast(MonarchAttention, operator)
    block = own.block or heads.tokens().grid[1]
    q, k, v = (x.unflatten(2, (-1, block)) for x in heads.qkv())
    q = heads.scale * q
    blocks = torch.eye(q.shape[2]).to(q).expand(*q.shape[:2], block, -1, -1)
    for _ in range(own.steps):
        means = torch.einsum("bhjlk,bhljd->bhkjd", blocks / blocks.sum(3, keepdim=True), q)
        logs = torch.einsum("bhkjd,bhkid->bhkji", means, k).log_softmax(-1)
        within = logs.exp()
        entropy = -(within * logs).sum(-1)
        scores = torch.einsum("bhljd,bhkjd->bhjlk", q, within @ k)
        blocks = (scores + entropy.mT[:, :, :, None]).softmax(-1)
    return torch.einsum("bhjlk,bhkjd->bhljd", blocks, within @ v).flatten(2, 3)


def manhattan(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q·k + log γ d) v with the distances d of all tokens."""
    q, k, v = heads.qkv()
    height, width = heads.tokens().grid
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(q)
    distance = torch.cdist(place, place, p=1)
    logits = heads.scale * q @ k.mT + cast(ManhattanAttention, operator).log_decay * distance
    return logits.softmax(-1) @ v


def differential(operator: AttentionOperator, heads: Heads) -> Tensor:
    """(softmax(s q·k) - λ softmax(s q W·k)) v."""
    own = cast(DifferentialAttention, operator)
    q, k, v = heads.qkv()
    first, second = ((heads.scale * x @ k.mT).softmax(-1) for x in (q, q @ own.weight))
    return (first - own.amount * second) @ v


def veca(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q (P k)ᵀ) P v with P = softmax(s L kᵀ)."""
    q, k, v = heads.qkv()
    gathering = (heads.scale * cast(CoreAttention, operator).cores @ k.mT).softmax(-1)
    return (heads.scale * q @ (gathering @ k).mT).softmax(-1) @ (gathering @ v)


def scan(operator: AttentionOperator, heads: Heads) -> Tensor:
    """(φ(q)·φ(k) M) v over its row sums, with the products M of the gates between all tokens."""
    own = cast(ScanAttention, operator)
    q, k, v = heads.qkv()
    gates = F.logsigmoid(k @ own.gate_weight + own.gate_bias).squeeze(3)
    upto = gates.cumsum(2)
    before = upto - gates
    earlier = (before[..., None] - before[:, :, None]).tril()
    later = (upto[:, :, None] - upto[..., None]).triu(1)
    weights = (F.elu(q) + 1) @ (F.elu(k - k.mean(2, keepdim=True)) + 1).mT * (earlier + later).exp()
    return weights @ v / weights.sum(3, keepdim=True)


def chosen_blocks(operator: AttentionOperator, heads: Heads) -> Tensor:
    """softmax(s q·k, masked) v + φ(q) φ(k)ᵀ (1 - mask) v W, with a mask of the best blocks of keys."""
    own = cast(BlockAttention, operator)
    q, k, v = heads.qkv()
    (tokens, _, _, place), _ = own.tables(heads.tokens(), q.device)
    block = place // tokens.shape[1]
    member = F.one_hot(block, len(tokens)).to(q)
    means = (member / member.sum(0)).T
    scores = (means @ q) @ (means @ k).mT
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[
        ..., : max(1, int(own.part * len(tokens)))
    ]
    mask = torch.zeros_like(scores).scatter(3, best, 1.0)[:, :, block][..., block]
    exact = (heads.scale * q @ k.mT).masked_fill(mask == 0, -torch.inf).softmax(-1) @ v
    if own.linear == "none" or best.shape[3] == len(tokens):
        return exact
    weights = (q.softmax(-1) @ k.softmax(-1).mT) * (1 - mask)
    far = (weights / weights.sum(-1, keepdim=True)) @ v
    if own.linear == "mixed":
        return torch.lerp(exact, far, own.gate.sigmoid())
    return exact + far @ own.projection


def uniform(operator: AttentionOperator, heads: Heads) -> Tensor:
    """Return the mean of the values, for every token."""
    v = heads.values()
    return v.mean(2, keepdim=True).expand_as(v)


FORMS: dict[type[AttentionOperator], Callable[[AttentionOperator, Heads], Tensor]] = {
    KernelAttention: kernel,
    LinformerAttention: linformer,
    AgentAttention: agent,
    NystromAttention: nystrom,
    WindowAttention: window,
    HybridAttention: hybrid,
    TTTAttention: ttt,
    ViT3Attention: vit3,
    MonarchAttention: monarch,
    BlockAttention: chosen_blocks,
    ScanAttention: scan,
    CoreAttention: veca,
    ManhattanAttention: manhattan,
    DifferentialAttention: differential,
    UniformAttention: uniform,
}


def _cells(operator: PooledAttention, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return the matrix of the means (cells, N), and the logs of the sizes of the cells."""
    v = heads.values()
    means = mean_weights(heads.tokens(), operator.cells(heads.tokens())).to(v)
    return means, torch.count_nonzero(means, 1).to(v.dtype).log()


def _tiles(tables: TileTables, heads: Heads) -> Tensor:
    q, k, v = heads.qkv()
    (queries, keys, sees, place), masked = tables(heads.tokens(), q.device)
    tiles = [
        x.index_select(2, index.flatten()).unflatten(2, tuple(index.shape)).flatten(0, 1)
        for x, index in ((q, queries), (k, keys), (v, keys))
    ]
    mask = sees.unsqueeze(0) if masked else None
    out = F.scaled_dot_product_attention(tiles[0], tiles[1], tiles[2], attn_mask=mask, scale=heads.scale)
    tiled: Tensor = out.unflatten(0, q.shape[:2]).flatten(2, 3)
    return tiled.index_select(2, place)
