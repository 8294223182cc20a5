"""‖A_t − A_s‖²_F of a teacher's softmax map and a student's map in terms, without forming either.

With A_s = Σ terms,

    ‖A_t − A_s‖² = ‖A_t‖² − 2 Σ ⟨A_t, term⟩ + Σ Σ ⟨term, term'⟩.

‖A_t‖² is a sum over rows of exp(lse(2 s Q Kᵀ) − 2 lse(s Q Kᵀ)), two log-sum-exps. For a low-rank term L Rᵀ,
⟨A_t, L Rᵀ⟩ = ⟨L, A_t R⟩, where A_t R is fused attention with R as its values, and the inner product of two of
them is the trace of (L₁ᵀ L₂)(R₂ᵀ R₁). Sparse terms and the rows of prefix tokens are small as they are. All is
linear in the number of tokens N, and exact.

Shape suffixes: B batch, H heads, N tokens, D head width, S columns of a sparse row, P prefix rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.attention.base import FirstRows, Heads, LowRank, Sparse, Term
from ...models.attention.fused import apply_map, map_logsumexp
from ...models.attention.kernels import precise, same_dtype
from ...models.attention.softmax import softmax_rows


def squared_distance(teacher: Heads, terms: list[Term]) -> Tensor:
    """‖A_t − A_s‖²_F of each image and head, (B, H), in float32 at least; the gradient is that of the terms."""
    terms = [_precise(term) for term in terms]
    lse_BHN = _logsumexp(teacher, 1.0)
    own = (_logsumexp(teacher, 2.0) - 2 * lse_BHN).exp().sum(-1)
    cross = torch.stack([_with_teacher(teacher, lse_BHN, term) for term in terms]).sum(0)
    pairs = [inner(a, b) for index, a in enumerate(terms) for b in terms[index + 1 :]]
    squares = torch.stack([inner(term, term) for term in terms]).sum(0)
    mixed = torch.stack(pairs).sum(0) if pairs else 0.0
    return own - 2 * cross + squares + 2 * mixed


def inner(a: Term, b: Term) -> Tensor:
    """⟨a, b⟩ of two terms as matrices, (B, H)."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.left.transpose(2, 3) @ b.left
        right = a.right.transpose(2, 3) @ b.right
        return (left * right).sum((2, 3))
    if isinstance(a, FirstRows) and isinstance(b, FirstRows):
        rows = min(a.weights.shape[2], b.weights.shape[2])
        return (a.weights[:, :, :rows] * b.weights[:, :, :rows]).sum((2, 3))
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        same_NST = (a.index[:, :, None] == b.index[:, None, :]).to(a.weights.dtype)
        return torch.einsum("bhns,nst,bhnt->bh", a.weights, same_NST, b.weights)
    if isinstance(b, LowRank) or isinstance(a, FirstRows):
        return inner(b, a)
    if isinstance(a, LowRank):
        if isinstance(b, FirstRows):
            rows = b.weights.shape[2]
            return (a.left[:, :, :rows] * (b.weights @ a.right)).sum((2, 3))
        return torch.einsum("bhns,bhnr,bhnsr->bh", b.weights, a.left, a.right[:, :, b.index])
    rows = b.weights.shape[2]
    picked = b.weights.gather(3, a.index[:rows].expand(*b.weights.shape[:2], -1, -1))
    return (a.weights[:, :, :rows] * picked).sum((2, 3))


def _with_teacher(teacher: Heads, lse_BHN: Tensor, term: Term) -> Tensor:
    """⟨A_t, term⟩, (B, H)."""
    q_BHND, k_BHND = teacher.qk()
    if isinstance(term, LowRank):
        mixed = apply_map(q_BHND, k_BHND, term.right, teacher.scale, teacher.bias)
        return (term.left * mixed).sum((2, 3))
    if isinstance(term, FirstRows):
        rows = torch.arange(term.weights.shape[2], device=q_BHND.device)
        return (term.weights * softmax_rows(teacher, rows)).sum((2, 3))
    logits_BHNS = _logits_at(teacher, term.index, lse_BHN.dtype)
    return (term.weights * (logits_BHNS - lse_BHN[..., None]).exp()).sum((2, 3))


def _logits_at(teacher: Heads, index_NS: Tensor, dtype: torch.dtype) -> Tensor:
    """s q_i·k_j + b_ij for the keys j of `index_NS`, of what the kernel takes q, k and b for, yet summed precisely:
    exp(logit − lse) is at most 1 only where both are rounded alike."""
    q_BHND, k_BHND = teacher.qk()
    q_BHND, k_BHND, _, bias = same_dtype(q_BHND, k_BHND, k_BHND, teacher.bias)
    keys_BHNSD = k_BHND[:, :, index_NS].to(dtype)
    with torch.autocast(q_BHND.device.type, enabled=False):
        logits = teacher.scale * torch.einsum("bhnd,bhnsd->bhns", q_BHND.to(dtype), keys_BHNSD)
    if bias is None:
        return logits
    return logits + bias.gather(3, index_NS.expand(*bias.shape[:2], -1, -1))


def _logsumexp(teacher: Heads, factor: float) -> Tensor:
    q, k = teacher.qk()
    bias = None if teacher.bias is None else factor * teacher.bias.detach()
    return map_logsumexp(q.detach(), k.detach(), factor * teacher.scale, bias)


def _precise(term: Term) -> Term:
    """Return the term in float32, whose products would overflow in half precision."""
    if isinstance(term, LowRank):
        return LowRank(precise(term.left), precise(term.right))
    if isinstance(term, Sparse):
        return Sparse(precise(term.weights), term.index)
    return FirstRows(precise(term.weights))
