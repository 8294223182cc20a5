"""Families that teach each other, by every method: equal to a dense reference, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from graftvit.models.copying.teacher_view import Normalization
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import gradient, relative_error
from support.models.dense import tiny as tiny_plain
from support.models.pyramids import images, tiny
from support.models.stage_reference import Place, expected, places
from torch import Tensor, nn

SIZE = (32, 24)
FINE, COARSE = (8, 6), (4, 3)
GRIDS = {
    "vit": [COARSE] * 2,
    "pvt": [FINE, COARSE, COARSE],
    "pvt1": [FINE, COARSE, COARSE],
    "pvt_li": [FINE, COARSE, COARSE],
    "svt": [FINE, FINE, COARSE, COARSE],
    "pcpvt": [FINE, FINE, COARSE, COARSE],
    "swin": [FINE, FINE, COARSE, COARSE],
    "swinv2": [FINE, FINE, COARSE, COARSE],
}
NORM = Normalization((0.5,) * 3, (0.5,) * 3)
METHODS = [
    "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v",
    "attention_output", "block_output", "feature", "logits",
]  # fmt: skip
QUICK = {("svt", "svt"), ("swin", "swinv2"), ("swin", "vit"), ("vit", "pvt")}
RING = [kind for kind in GRIDS if kind not in ("pvt_li", "pcpvt")]
"""Each kind learns from itself, and those of the ring from the two before."""
OTHERS = {
    *((kind, kind) for kind in GRIDS),
    *((RING[number - step], kind) for number, kind in enumerate(RING) for step in (1, 2)),
}
PAIRS = [*sorted(QUICK), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in sorted(OTHERS - QUICK))]


@cache
def _model(kind: str, seed: int) -> nn.Module:
    if kind == "vit":
        sizes: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
        return tiny_plain("vit", seed=seed, img_size=SIZE, **sizes)
    return tiny(kind, SIZE, seed=seed).double()


def model(kind: str, seed: int) -> nn.Module:
    return copy.deepcopy(_model(kind, seed))


def fits(method: str, teacher: Place, student: Place) -> bool:
    """Whether a layer can learn from another one, by the definition of each method."""
    same = teacher.kind == student.kind
    reduced = {place.kind if place.kind[0] in ("keys", "pool") else None for place in (teacher, student)}
    if method in ("attention_output", "block_output"):
        return True
    if method == "distill":
        return same or (teacher.kind[0] == "window" and student.kind[0] == "whole")
    if method in ("copy", "copy_v"):
        return same
    if method in ("copy_q", "copy_k"):
        return same and teacher.cosine == student.cosine
    if method == "distill_v":
        return len(reduced) == 1
    return teacher.cosine == student.cosine and (method == "distill_q" or len(reduced) == 1)


def rounds(allowed: dict[int, list[int]]) -> Iterator[list[tuple[int, int]]]:
    """Cover all pairs of layers by lists that name each student layer once."""
    for number in range(max((len(each) for each in allowed.values()), default=0)):
        yield [(theirs[number % len(theirs)], ours) for ours, theirs in allowed.items()]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_equals_its_dense_reference_or_is_refused(teacher: str, student: str) -> None:
    theirs, ours, x = model(teacher, 1), model(student, 2), images(SIZE).double()
    places_t, places_s = places(theirs, GRIDS[teacher]), places(ours, GRIDS[student])
    for method in METHODS:
        if method in ("feature", "logits"):
            check(method, [], (theirs, places_t), (ours, places_s), x)
            continue
        allowed: dict[int, list[int]] = {}
        for s, place_s in enumerate(places_s):
            for t, place_t in enumerate(places_t):
                if place_t.grid != place_s.grid or not fits(method, place_t, place_s):
                    with pytest.raises(TransferError, match=f"layer {s} of the student|layers {t}>{s} "):
                        DualViT(theirs, ours, method, layers=f"{t}>{s}")
                else:
                    allowed.setdefault(s, []).append(t)
        for pairs in rounds(allowed):
            check(method, pairs, (theirs, places_t), (ours, places_s), x)


@pytest.mark.parametrize("kind", ["pvt", "pvt_li", "svt"])
@pytest.mark.parametrize("method", ["copy", "distill_k"])
def test_a_teacher_is_cut_within_a_layer_with_reduced_keys(kind: str, method: str) -> None:
    layer = 1 if kind == "svt" else 0
    theirs, ours = model(kind, 1), model(kind, 2)
    of_both = places(theirs, GRIDS[kind])
    check(method, [(layer, layer)], (theirs, of_both), (ours, of_both), images(SIZE).double())


def check(
    method: str,
    pairs: list[tuple[int, int]],
    teacher: tuple[nn.Module, list[Place]],
    student: tuple[nn.Module, list[Place]],
    x: Tensor,
) -> None:
    """Compare logits, loss and gradients of a step with those of the reference."""
    twin = copy.deepcopy(student[0])
    logits, loss = expected(method, pairs, (copy.deepcopy(teacher[0]), teacher[1]), (twin, student[1]), x)
    (logits.square().mean() + loss).backward()
    own = copy.deepcopy(student[0])
    options: dict[str, Any] = {"layers": pairs} if pairs else {}
    options |= {} if method.startswith("copy") else {"weight": 1.0}
    options |= dict.fromkeys(("teacher_normalization", "student_normalization"), NORM)
    dual = DualViT(teacher[0], own, method, **options)
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    case = f"{method} {pairs}"
    assert relative_error(out.logits, logits) <= 1e-9, case
    assert float(out.transfer_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-9), case
    assert relative_error(gradient(own), gradient(twin)) <= 1e-8, case
