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
from torch import Tensor

from ...models.attention.base import Heads
from ...models.attention.fused import apply_map, map_logsumexp
from ...models.attention.kernels import mean_map, precise
from ...models.copying.tape import average_heads, spread_heads
from .window_maps import window_map_loss


@dataclass(frozen=True)
class MapLoss:
    """How two maps are compared; see `TransferConfig` for the fields."""

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
        loss = loss - _expected_bias(student, teacher, sizes, weights)
        if self.entropy:
            loss = loss + _expected_bias(teacher, teacher, sizes, weights)
        return loss * self.temperature**2

    def _warm(self, heads: Heads) -> Heads:
        if self.temperature == 1.0:
            return heads
        bias = None if heads.bias is None else heads.bias / self.temperature
        return Heads(heads.q, heads.k, heads.v, bias, heads.scale / self.temperature, windows=heads.windows)


def entropy(teacher: Heads) -> Tensor:
    """Return H(P) of each row, without the expected value of the bias (`_expected_bias`)."""
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


def _expected_bias(
    student: Heads, teacher: Heads, sizes: list[int], weights: Tensor | None
) -> Tensor | float:
    """Return the mean over batch, heads and rows of Σ_j P_t(i, j) b(i, j); the mean map is as large as a bias."""
    if student.bias is None:
        return 0.0
    with torch.no_grad():
        map_HMN = average_heads(mean_map(*teacher.qk(), teacher.bias, teacher.scale)[None], sizes)[0]
    rows = (map_HMN * student.bias[0].to(map_HMN.dtype)).sum(-1).mean(0)
    return rows.mean() if weights is None else (rows * weights).sum()
