"""Cross-entropy and KL divergence between attention maps, without the maps.

With P_t, P_s the rows of teacher and student, s the student's scale and b its relative position bias,

    CE = −Σ_j P_t(j) log P_s(j) = lse_s(i) − s q_s(i)·(P_t K_s)(i) − Σ_j P_t(i, j) b(i, j)

(Attention Transfer, arXiv:2411.09702, eq. of the distillation loss), averaged over batch, heads and query rows.
KL = CE − H(P_t), with the same gradient. P_t K_s is one call of fused attention; lse_s is a by-product of the
student's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.attention.base import Heads
from ...models.attention.fused import apply_map, map_logsumexp
from ...models.attention.kernels import mean_map, precise, same_dtype
from ...models.attention.softmax import softmax_rows
from ...models.copying.copying_operators import Part
from ...models.copying.tape import average_heads, spread_heads
from ...models.families import Site
from ...models.hosting import has_cosine_logits, map_structure
from ...models.map_structure import MapStructure, Windows

# What the attention of a layer computes, and how that of two layers differs.

WHOLE = str(MapStructure())


@dataclass(frozen=True)
class LayerMaps:
    """What the attention of a layer computes, for methods that read more than its output."""

    structure: MapStructure
    has_cosine_logits: bool

    @classmethod
    def of(cls, model: nn.Module, site: Site) -> LayerMaps:
        """Read a layer that has attention."""
        return cls(map_structure(model, site), has_cosine_logits(model, site))


def differ(teacher: LayerMaps, student: LayerMaps) -> str:
    """Say how the maps of two layers lie."""
    return f"the teacher's maps are {teacher.structure} and the student's {student.structure}"


def mixing(teacher: LayerMaps, student: LayerMaps) -> str:
    """Say that maps are mixed between heads; empty where none are."""
    owner = next(
        (name for name, maps in (("teacher", teacher), ("student", student)) if maps.structure.mixed), ""
    )
    return owner and f"the {owner} mixes its maps between heads, so they are no softmax of queries and keys"


def padding(teacher: LayerMaps, student: LayerMaps) -> str:
    """Say that maps of padded stripes have a key that is no token."""
    owner, maps = ("teacher", teacher) if teacher.structure.padded else ("student", student)
    return (
        f"the {owner}'s maps are {maps.structure}, whose padding is a key that no token has (images whose grids are "
        "whole stripes have none)"
    )


def differ_in(part: Part, teacher: LayerMaps, student: LayerMaps) -> str | None:
    """Say why the queries, keys or values of two layers do not mean the same; None where they do."""
    if part != "v" and teacher.has_cosine_logits != student.has_cosine_logits:
        owners = ("teacher", "student") if teacher.has_cosine_logits else ("student", "teacher")
        return f"the {owners[0]} takes its softmax over cosines of queries and keys, and the {owners[1]} does not"
    if part != "q" and (teacher.structure.padded or student.structure.padded):
        return padding(teacher, student)
    if part != "q" and teacher.structure.reduction != student.structure.reduction:
        return f"{differ(teacher, student)}, so their keys and values are not of the same tokens"
    return None


# Maps within windows: attention with its log-sum-exp, and the loss between maps.
#
# A map within windows has N M entries for N tokens in windows of M, as many as timm's own attention of Swin,
# so it is formed here. Shape suffixes: B images, W windows, V = B·W, H heads, M tokens of a window, N of the
# grid, D head width.


def window_attention(heads: Heads) -> tuple[Tensor, Tensor]:
    """Return P V (V, H, M, D) and the log-sum-exp (V, H, M) of the attention within each window."""
    q, k, v, bias = same_dtype(*heads.qkv(), heads.bias)
    logits = window_logits(Heads(q, k, None, bias, heads.scale))
    lse = logits.logsumexp(-1)
    return (logits - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def window_logits(heads: Heads) -> Tensor:
    """Return s Q Kᵀ + bias (V, H, M, M) in float32 or better."""
    q, k = heads.qk()
    with torch.autocast(q.device.type, enabled=False):
        logits = heads.scale * precise(q) @ precise(k).transpose(-2, -1)
    return logits if heads.bias is None else logits + heads.bias


def window_map_loss(
    student: Heads, teacher: Heads, sizes: list[int], lse: Tensor | None, *, entropy: bool
) -> Tensor:
    """Return the mean over images, heads and tokens of the cross-entropy of the student's map to the teacher's.

    CE = lse_s(i) − s q_s(i)·(P_t K_s)(i) − Σ_j P_t(i, j) b_s(i, j), and KL = CE − H(P_t) with `entropy`. The teacher's
    maps are within windows. The student's are within the same windows, or of all tokens to all tokens: then P_t is zero
    outside its window, and the keys with which the teacher pads its grid are removed, as tokens that the student lacks.
    `lse` is the student's log-sum-exp, if its own attention computed it.
    """
    windows = teacher.windows
    assert windows is not None
    with torch.no_grad():
        logits = window_logits(teacher)
        if student.windows is None and windows.is_padded:
            logits = logits.masked_fill(~_is_token(windows, logits), -torch.inf)
        target = average_heads(logits.softmax(-1), sizes)
    if student.windows is None:
        lse = map_logsumexp(*student.qk(), student.scale, student.bias) if lse is None else lse
        lse = _cut(windows, lse.unsqueeze(-1)).squeeze(-1)
        expected_bias = _expected_bias(windows, target, student.bias)
        student = student.each(lambda x: _cut(windows, x), None)
    else:
        lse = window_logits(student).logsumexp(-1) if lse is None else lse
        expected_bias = 0.0 if student.bias is None else (target * student.bias).sum(-1)
    q, k = (precise(x).to(target.dtype) for x in student.qk())
    with torch.autocast(q.device.type, enabled=False):
        loss = lse - student.scale * (q * (target @ k)).sum(-1) - expected_bias
    if entropy:
        loss = loss + torch.xlogy(target, target).sum(-1)
    return windows.join(loss.unsqueeze(-1)).mean()


def _cut(windows: Windows, x_BHND: Tensor) -> Tensor:
    """Return tokens by window, with zeros for padded ones."""
    return windows.cut(x_BHND, x_BHND.new_zeros(1, 1, 1, 1))


def _is_token(windows: Windows, like: Tensor) -> Tensor:
    """Return which keys of each window are tokens of the grid, (V, 1, 1, M)."""
    tokens = like.new_ones(1, 1, windows.grid[0] * windows.grid[1], 1)
    known = _cut(windows, tokens) > 0
    return known.repeat(len(like) // len(known), 1, 1, 1).transpose(-2, -1)


def _expected_bias(windows: Windows, target_VHMM: Tensor, bias: Tensor | None) -> Tensor | float:
    """Return Σ_j P_t(i, j) b(i, j), (V, H, M), of a bias (1 or B, H, N, N) between all tokens of the grid."""
    if bias is None:
        return 0.0
    tokens = torch.arange(bias.shape[-1], device=bias.device).view(1, 1, -1, 1)
    index_WM = _cut(windows, tokens).flatten(1)
    by_window = bias[:, :, index_WM[:, :, None], index_WM[:, None, :]].transpose(1, 2)
    by_image = target_VHMM.unflatten(0, (-1, len(index_WM)))
    expected: Tensor = (by_image * by_window).sum(-1)
    return expected.flatten(0, 1)


@dataclass(frozen=True)
class MapLoss:
    """How two maps are compared; see `TransferConfig` for the fields.

    The loss, log-sum-exp minus expected logit, is a small difference of numbers as large as the logits: float32 keeps
    it to about 1e-7 of the largest logit, whatever the loss. Its gradient is not such a difference.
    """

    entropy: bool = False
    temperature: float = 1.0
    rows: float = 1.0

    @property
    def needs_own_rows(self) -> bool:
        """Return whether the student's log-sum-exp must be computed apart from its own attention."""
        return self.temperature != 1.0 or self.rows < 1.0

    def __call__(
        self,
        student: Heads,
        teacher: Heads,
        *,
        sizes: list[int],
        num_prefix: int,
        lse_BHN: Tensor | None = None,
    ) -> Tensor:
        """Return the loss as a scalar, in float32 or better.

        `teacher` has `sizes[h]` consecutive heads for head h of `student`; the target is the mean of their maps.
        `lse_BHN` is the student's log-sum-exp if its own attention computed it.
        """
        student, teacher = self._warm(student), self._warm(teacher)
        if teacher.windows is not None:
            loss = window_map_loss(student, teacher, sizes, lse_BHN, entropy=self.entropy)
            return loss * self.temperature**2
        weights = None
        if self.rows < 1.0:
            rows, weights = sample_rows(student, self.rows, num_prefix)
            student, teacher = at_rows(student, rows), at_rows(teacher, rows)
        if lse_BHN is None:
            lse_BHN = map_logsumexp(*student.qk(), student.scale, student.bias)
        loss_BHN = lse_BHN - _expected_logit(student, teacher, sizes)
        if self.entropy:
            loss_BHN = loss_BHN - entropy(teacher)
        loss = loss_BHN.mean() if weights is None else (loss_BHN.mean((0, 1)) * weights).sum()
        loss = loss - _expected_table_bias(student, teacher, sizes, weights)
        if self.entropy:
            loss = loss + _expected_table_bias(teacher, teacher, sizes, weights)
        return loss * self.temperature**2

    def _warm(self, heads: Heads) -> Heads:
        if self.temperature == 1.0:
            return heads
        bias = None if heads.bias is None else heads.bias / self.temperature
        return Heads(heads.q, heads.k, heads.v, bias, heads.scale / self.temperature, windows=heads.windows)


def entropy(teacher: Heads) -> Tensor:
    """Return H(P) of each row, without the expected value of the bias (`_expected_table_bias`)."""
    with torch.no_grad():
        lse = map_logsumexp(*teacher.qk(), teacher.scale, teacher.bias)
        return lse - _expected_logit(teacher, teacher, [1])


def sample_rows(heads: Heads, fraction: float, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Draw the query rows of one step, with weights whose weighted sum is an unbiased mean over all rows.

    All prefix rows are included with weight 1/N; m of the n patch rows are drawn without replacement, each with
    weight n / (N m).
    """
    q, _ = heads.qk()
    total, device = q.shape[2], q.device
    patches = total - num_prefix
    drawn = max(1, round(fraction * patches))
    picked = torch.randperm(patches, device=device)[:drawn] + num_prefix
    rows = torch.cat([torch.arange(num_prefix, device=device), picked])
    weights = torch.full((num_prefix + drawn,), 1 / total, device=device)
    weights[num_prefix:] = patches / (total * drawn)
    return rows, weights


def at_rows(heads: Heads, rows: Tensor) -> Heads:
    """Select some rows of queries and bias; keep all keys."""
    q, k = heads.qk()
    bias = None if heads.bias is None else heads.bias.index_select(2, rows)
    return Heads(q.index_select(2, rows), k, heads.v, bias, heads.scale)


def _expected_logit(student: Heads, teacher: Heads, sizes: list[int]) -> Tensor:
    """Return s q_s·(P_t K_s), (B, H, N)."""
    q, k = student.qk()
    keys = spread_heads(k, sizes)
    mean_key = average_heads(apply_map(*teacher.qk(), keys, teacher.scale, teacher.bias), sizes)
    mean_key = precise(mean_key)
    return student.scale * (q.to(mean_key.dtype) * mean_key).sum(-1)


def _expected_table_bias(
    student: Heads, teacher: Heads, sizes: list[int], weights: Tensor | None
) -> Tensor | float:
    """Return the mean over batch, heads and rows of Σ_j P_t(i, j) b(i, j); the map formed is as large as the bias."""
    if student.bias is None:
        return 0.0
    one_bias = len(student.bias) == 1
    with torch.no_grad():  # a bias of each image needs the map of each
        maps = (
            mean_map(*teacher.qk(), teacher.bias, teacher.scale)[None]
            if one_bias
            else softmax_rows(teacher, slice(None))
        )
        maps = average_heads(maps, sizes)
    rows = (maps * student.bias.to(maps.dtype)).sum(-1).mean((0, 1))
    return rows.mean() if weights is None else (rows * weights).sum()
