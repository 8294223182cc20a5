"""Which student layer learns from which teacher layer. No torch here, so that a mistake is refused at once.

The grammar of `transfer.layers`, for a student of depth L (negative numbers count from the end):

    all            every layer
    first:N        layers 0 … N-1
    last:N         layers L-N … L-1
    every:N        the last layer and every N-th before it (N-1, 2N-1, … where N divides L)
    A:B            A, A+1, … B-1; either side may be left out; :-6 is the first 18 of 24
    0,3-5,-1       these layers, named as in a plan (`layer_numbers`): 0, 3, 4, 5 and the last
    stage3         the layers of the student's third stage; stage2-3 those of two, stage3.0-1 two of them
    2>0,5>1        teacher>student pairs, of layers or of any that are named as in a plan: stage2>stage3

Without pairs the selection is of student layers, and teacher layers are spread evenly (`spread_layer`): inside each
stage where both models have equally many stages, else over the whole depth. A plain vision transformer has one stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...models.errors import ConfigError, TransferError
from ...models.plan_syntax import LAYERS, STAGE, STAGES, layer_numbers

GRAMMAR = (
    "all, first:N, last:N, every:N, a range A:B, a list 0,3-5,-1, stages stage2,stage3 or stage2-3, layers of a stage "
    "stage3.0-1, or teacher>student pairs of these, 2>0,5>1 or stage2>stage3"
)
_COUNTED = re.compile(r"(first|last|every):(-?\d+)")
_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
_NAMED = rf"(?:{LAYERS.pattern}|{STAGE.pattern}|{STAGES.pattern})"
_LISTED, _PAIRED = (re.compile(rf"{item}(?:,{item})*") for item in (_NAMED, f"{_NAMED}>{_NAMED}"))


def check_layers(layers: str) -> None:
    """Raise TransferError for text that is no choice of layers in any model."""
    compact = re.sub(r"\s", "", layers)
    if compact != "all" and not any(form.fullmatch(compact) for form in (_COUNTED, _RANGE, _LISTED, _PAIRED)):
        raise TransferError(f"transfer.layers={layers!r} is not a choice of layers; valid: {GRAMMAR}")


def choose_layers(
    layers: str | Sequence[int] | Sequence[tuple[int, int]],
    teacher_depths: Sequence[int],
    student_depths: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the pairs (teacher block, student block) for `layers`, in the order of the student's blocks.

    The depths are the numbers of blocks of each stage. Blocks are numbered through all stages.

    Raises TransferError: a layer is out of range or named twice for the student, or no layer is selected.
    """
    student_depth = sum(student_depths)
    items: Sequence[int] | Sequence[tuple[int, int]]
    items = _parse(layers, teacher_depths, student_depths) if isinstance(layers, str) else layers
    pairs = [_pair(item, layers, teacher_depths, student_depths) for item in items]
    if not pairs:
        raise TransferError(
            f"transfer.layers={layers!r} selects no layer of the student, which has 0 to {student_depth - 1}"
        )
    students = [student for _, student in pairs]
    for student in students:
        if students.count(student) > 1:
            raise TransferError(
                f"transfer.layers={layers!r} names layer {student} of the student more than once; "
                f"name each of 0 to {student_depth - 1} at most once"
            )
    return sorted(pairs, key=lambda pair: pair[1])


def spread_layer(student: int, teacher_depth: int, student_depth: int) -> int:
    """Return the teacher layer for a student layer: t = ceil((s + 1) L_t / L_s) - 1.

    Layers are spread evenly, the last learns from the last, and with equal depth layer i learns from layer i.
    """
    return -(-(student + 1) * teacher_depth // student_depth) - 1


def _spread(student: int, teacher_depths: Sequence[int], student_depths: Sequence[int]) -> int:
    """Return the teacher layer for a student layer: of the same stage where there are equally many stages."""
    if len(teacher_depths) != len(student_depths):
        return spread_layer(student, sum(teacher_depths), sum(student_depths))
    before = 0  # the teacher's layers of earlier stages
    for theirs, ours in zip(teacher_depths, student_depths, strict=True):
        if student < ours:
            return before + spread_layer(student, theirs, ours)
        before, student = before + theirs, student - ours
    raise AssertionError("the layer was checked")


def _parse(
    text: str, teacher_depths: Sequence[int], student_depths: Sequence[int]
) -> list[int] | list[tuple[int, int]]:
    compact, depth = re.sub(r"\s", "", text), sum(student_depths)
    if compact == "all":
        return list(range(depth))
    if match := _COUNTED.fullmatch(compact):
        return _counted(match[1], int(match[2]), text, depth)
    if match := _RANGE.fullmatch(compact):
        return _range(match[1], match[2], text, depth)
    check_layers(text)
    if ">" not in compact:
        return _numbers(compact, student_depths, "student", text)
    pairs: list[tuple[int, int]] = []
    for theirs, ours in (pair.split(">") for pair in compact.split(",")):
        teacher = _numbers(theirs, teacher_depths, "teacher", text)
        student = _numbers(ours, student_depths, "student", text)
        spread = (spread_layer(place, len(teacher), len(student)) for place in range(len(student)))
        pairs += zip((teacher[place] for place in spread), student, strict=True)
    return pairs


def _numbers(named: str, depths: Sequence[int], owner: str, text: str) -> list[int]:
    """Return the layers of the teacher or the student that are named as in a plan."""
    try:
        return layer_numbers(named, depths, f"transfer.layers={text!r} of the {owner}")
    except ConfigError as error:
        raise TransferError(f"{error}; {ANOTHER}") from error


ANOTHER = "give another --layers (in Python layers), such as all"


def _counted(word: str, number: int, text: str, depth: int) -> list[int]:
    if not 1 <= number <= depth:
        raise TransferError(
            f"transfer.layers={text!r} needs a number from 1 to {depth}, the depth of the student; {ANOTHER}"
        )
    if word == "first":
        return list(range(number))
    if word == "last":
        return list(range(depth - number, depth))
    return list(range(depth - 1, -1, -number))


def _range(start: str | None, stop: str | None, text: str, depth: int) -> list[int]:
    bounds = (0 if start is None else int(start), depth if stop is None else int(stop))
    if any(not -depth <= bound <= depth for bound in bounds):
        raise TransferError(
            f"transfer.layers={text!r} needs bounds from {-depth} to {depth}, the depth of the student; {ANOTHER}"
        )
    return list(range(depth))[slice(*bounds)]


def _pair(
    item: int | tuple[int, int],
    layers: object,
    teacher_depths: Sequence[int],
    student_depths: Sequence[int],
) -> tuple[int, int]:
    teacher_depth, student_depth = sum(teacher_depths), sum(student_depths)
    if isinstance(item, int):
        student = _index(item, student_depth, "student", layers)
        return _spread(student, teacher_depths, student_depths), student
    if len(item) != 2:
        raise TransferError(
            f"transfer.layers={layers!r} holds {item!r}; a pair is (teacher layer, student layer)"
        )
    teacher = _index(item[0], teacher_depth, "teacher", layers)
    return teacher, _index(item[1], student_depth, "student", layers)


def _index(layer: int, depth: int, owner: str, layers: object) -> int:
    if not -depth <= layer < depth:
        raise TransferError(
            f"transfer.layers={layers!r} names layer {layer} of the {owner}, which has 0 to {depth - 1} "
            f"(or {-depth} to -1 from the end); {ANOTHER}"
        )
    return layer % depth
