"""Which teacher heads each student head learns from.

The grammar of `transfer.heads`:

    all            head h from head h; the two models must have equally many
    0,1,4          only these heads, student head h from teacher head h
    3>0,1>2        teacher>student pairs; a student head named twice learns from the mean map of its teachers
    mean           consecutive groups of teacher heads, averaged; or one teacher head for several students'
    match          the assignment of least map distance on a calibration batch (`map_distance`, `match_heads`)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.copying.tape import HeadMap
from ...models.errors import TransferError

GRAMMAR = "all, a list 0,1,4, teacher>student pairs 3>0,1>2, mean or match"
CHUNK_ELEMENTS = 2**22  # attention probabilities held at once while distances are measured
_LIST = re.compile(r"-?\d+(,-?\d+)*")
_PAIRS = re.compile(r"-?\d+>-?\d+(,-?\d+>-?\d+)*")


def resolve_heads(heads: str | Sequence[int], teacher_heads: int, student_heads: int) -> HeadMap:
    """Return the map of heads for `heads`. Raise `TransferError` if it is invalid, or 'match' (see `match_heads`)."""
    if not isinstance(heads, str):
        return _subset(list(heads), heads, teacher_heads, student_heads)
    compact = re.sub(r"\s", "", heads)
    if compact == "all":
        return _all(teacher_heads, student_heads)
    if compact == "mean":
        return _mean(teacher_heads, student_heads)
    if _LIST.fullmatch(compact):
        return _subset([int(number) for number in compact.split(",")], heads, teacher_heads, student_heads)
    if _PAIRS.fullmatch(compact):
        return _pairs(compact, heads, teacher_heads, student_heads)
    if compact == "match":
        raise TransferError(
            "transfer.heads='match' is measured on a batch of images: give a calibration batch"
        )
    raise TransferError(f"transfer.heads={heads!r} is not a choice of heads; valid: {GRAMMAR}")


def match_heads(distance_HtHs: Tensor) -> HeadMap:
    """Return the one-to-one assignment of least total distance, from the (teacher heads, student heads) matrix.

    If the student has more heads than the teacher, the remaining heads learn from no head.
    """
    from scipy.optimize import linear_sum_assignment  # here: it takes long, and few runs need it

    if not bool(torch.isfinite(distance_HtHs).all()):
        raise TransferError(
            "transfer.heads='match' measured map distances that are not finite; check the teacher's weights"
        )
    teacher_heads, student_heads = distance_HtHs.shape
    rows, columns = linear_sum_assignment(distance_HtHs.detach().cpu().double().numpy())
    teacher_of = {int(column): int(row) for row, column in zip(rows, columns, strict=True)}
    groups = tuple((teacher_of[head],) if head in teacher_of else None for head in range(student_heads))
    return HeadMap(groups, teacher_heads)


@torch.no_grad()
def map_distance(
    q_t: Tensor,
    k_t: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    scale_t: float,
    scale_s: float,
    *,
    bias_t: Tensor | None = None,
    bias_s: Tensor | None = None,
) -> Tensor:
    """Return the mean over batch and queries of sum_j (A_t[i, j] - A_s[i, j])^2 for every pair of heads: (H_t, H_s).

    A = softmax(scale q k^T + bias). Queries and keys are (B, H, N, D) over the same tokens; a bias is
    broadcastable to (B, H, N, N). Rows are processed a few at a time, so memory grows with N, not N^2.
    """
    batch, teacher_heads, tokens, _ = q_t.shape
    student_heads = q_s.shape[1]
    rows = max(1, CHUNK_ELEMENTS // (batch * (teacher_heads + student_heads) * tokens))
    total_TS = q_t.new_zeros((teacher_heads, student_heads), dtype=torch.float32)
    for start in range(0, tokens, rows):
        chosen = slice(start, start + rows)
        map_t = _map_rows(q_t, k_t, scale_t, bias_t, chosen)
        map_s = _map_rows(q_s, k_s, scale_s, bias_s, chosen)
        for head in range(teacher_heads):
            total_TS[head] += (map_t[:, head, None] - map_s).square().sum((0, 2, 3))
    return total_TS / (batch * tokens)


def _map_rows(q_BHND: Tensor, k_BHND: Tensor, scale: float, bias: Tensor | None, rows: slice) -> Tensor:
    logits_BHrN = scale * (q_BHND[:, :, rows].float() @ k_BHND.float().transpose(-2, -1))
    if bias is not None:
        logits_BHrN = logits_BHrN + bias[..., rows, :].float()
    return logits_BHrN.softmax(-1)


def _all(teacher_heads: int, student_heads: int) -> HeadMap:
    if teacher_heads != student_heads:
        raise TransferError(
            f"transfer.heads='all' needs equally many heads, but the teacher has {teacher_heads} and the "
            f"student {student_heads}; use 'mean' (groups), 'match' (assignment) or pairs such as 3>0,1>2"
        )
    return HeadMap(tuple((head,) for head in range(student_heads)), teacher_heads)


def _mean(teacher_heads: int, student_heads: int) -> HeadMap:
    large, small = max(teacher_heads, student_heads), min(teacher_heads, student_heads)
    if large % small:
        raise TransferError(
            f"transfer.heads='mean' needs one head count to divide the other, but the teacher has "
            f"{teacher_heads} and the student {student_heads}; use 'match' or pairs such as 3>0,1>2"
        )
    size = large // small
    if teacher_heads < student_heads:
        return HeadMap(tuple((head // size,) for head in range(student_heads)), teacher_heads)
    return HeadMap(tuple(tuple(range(h * size, (h + 1) * size)) for h in range(student_heads)), teacher_heads)


def _subset(chosen: list[int], heads: object, teacher_heads: int, student_heads: int) -> HeadMap:
    if not chosen:
        raise TransferError(f"transfer.heads={heads!r} selects no head; valid: {GRAMMAR}")
    if teacher_heads != student_heads and min(chosen) < 0:
        raise TransferError(
            f"transfer.heads={heads!r} counts from the end, which needs equally many heads, but the "
            f"teacher has {teacher_heads} and the student {student_heads}; count from 0"
        )
    shared = min(teacher_heads, student_heads)
    indices = [_index(head, shared, "both models", heads) for head in chosen]
    _refuse_repeats(indices, heads)
    return HeadMap(
        tuple((head,) if head in indices else None for head in range(student_heads)), teacher_heads
    )


def _pairs(compact: str, heads: object, teacher_heads: int, student_heads: int) -> HeadMap:
    groups: list[list[int]] = [[] for _ in range(student_heads)]
    for pair in compact.split(","):
        teacher, student = (int(side) for side in pair.split(">"))
        groups[_index(student, student_heads, "the student", heads)].append(
            _index(teacher, teacher_heads, "the teacher", heads)
        )
    for group in groups:
        _refuse_repeats(group, heads)
    return HeadMap(tuple(tuple(group) if group else None for group in groups), teacher_heads)


def _refuse_repeats(indices: list[int], heads: object) -> None:
    for index in indices:
        if indices.count(index) > 1:
            raise TransferError(f"transfer.heads={heads!r} names head {index} more than once; name it once")


def _index(head: int, count: int, owner: str, heads: object) -> int:
    if not -count <= head < count:
        raise TransferError(
            f"transfer.heads={heads!r} names head {head} of {owner}, with heads 0 to {count - 1}"
        )
    return head % count
