"""Maps within windows: attention with its log-sum-exp, and the loss between maps.

A map within windows has N M entries for N tokens in windows of M, as many as timm's own attention of Swin, so it is
formed here. Shape suffixes: B images, W windows, V = B·W, H heads, M tokens of a window, N of the grid, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.attention.base import Heads
from ...models.attention.fused import map_logsumexp
from ...models.attention.kernels import precise, same_dtype
from ...models.copying.tape import average_heads
from ...models.map_structure import Windows


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
    """Return Σ_j P_t(i, j) b(i, j), (V, H, M), of a bias (1, H, N, N) between all tokens of the grid."""
    if bias is None:
        return 0.0
    tokens = torch.arange(bias.shape[-1], device=bias.device).view(1, 1, -1, 1)
    index_WM = _cut(windows, tokens).flatten(1)
    bias_WHMM = bias[0][:, index_WM[:, :, None], index_WM[:, None, :]].transpose(0, 1)
    by_image = target_VHMM.unflatten(0, (-1, len(index_WM)))
    expected: Tensor = (by_image * bias_WHMM).sum(-1)
    return expected.flatten(0, 1)
