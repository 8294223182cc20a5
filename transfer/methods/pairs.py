"""Which student layer learns from which teacher layer.

The grammar of `transfer.layers`, for a student of depth L (negative numbers count from the end):

    all            every layer
    first:N        layers 0 … N-1
    last:N         layers L-N … L-1
    every:N        the last layer and every N-th before it (N-1, 2N-1, … where N divides L)
    A:B            A, A+1, … B-1; either side may be left out; :-6 is the first 18 of 24
    0,3,-1         these layers
    2>0,5>1        teacher>student pairs
    stage3         the layers of the student's third stage; several stages: stage2,stage3
    stage3.0-1     layers 0 and 1 of the student's third stage
    stage2>stage3  the layers of the student's third stage learn from the teacher's second

Without pairs the selection is of student layers, and teacher layers are spread evenly (`spread_layer`): inside each
stage where both models have equally many stages, else over the whole depth. A plain vision transformer has one stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from ...models.copying.grids import GridRule, match_tokens, words
from ...models.copying.tape import HeadMap, LayerPair, Link, Step, Tape, take
from ...models.copying.teacher_view import ShownImages, view_attention
from ...models.errors import TransferError
from ...models.families import (
    Block,
    Site,
    blocks_of,
    check_supported,
    depths,
    evaluating,
    find_family,
    has_relative_bias,
    is_pyramid,
    layout_of,
    sites,
)
from ...models.layer_plan import STAGE
from ...models.pyramid_conversion import has_bias
from ..loss_config import LossConfig
from .heads import map_distance, match_heads, resolve_heads
from .map_loss import LayerMaps
from .mismatch import compare_models, report_mismatch
from .registry import find_method

if TYPE_CHECKING:
    from .method import TransferMethod


GRAMMAR = (
    "all, first:N, last:N, every:N, a range A:B, a list 0,3,-1, teacher>student pairs 2>0,5>1, stages stage2,stage3, "
    "layers of a stage stage3.0-1 or teacher>student pairs of stages stage2>stage3"
)
_COUNTED = re.compile(r"(first|last|every):(-?\d+)")
_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
_LIST = re.compile(r"-?\d+(,-?\d+)*")
_PAIRS = re.compile(r"-?\d+>-?\d+(,-?\d+>-?\d+)*")
_STAGE_PAIR = rf"{STAGE.pattern}(>{STAGE.pattern})?"
_STAGES = re.compile(rf"{_STAGE_PAIR}(,{_STAGE_PAIR})*")


def resolve_layers(
    layers: str | Sequence[int] | Sequence[tuple[int, int]],
    teacher_depths: Sequence[int],
    student_depths: Sequence[int],
) -> tuple[LayerPair, ...]:
    """Return the pairs of blocks for `layers`, in the order of the student's blocks.

    The depths are the numbers of blocks of each stage. Blocks are numbered through all stages.

    Raises TransferError: a layer is out of range or named twice for the student, or no layer is selected.
    """
    student_depth = sum(student_depths)
    items: Sequence[int] | Sequence[tuple[int, int]]
    if isinstance(layers, str) and _STAGES.fullmatch(re.sub(r"\s", "", layers)):
        items = _stages(layers, teacher_depths, student_depths)
    else:
        items = _parse(layers, student_depth) if isinstance(layers, str) else layers
    pairs = [_pair(item, layers, teacher_depths, student_depths) for item in items]
    if not pairs:
        raise TransferError(
            f"transfer.layers={layers!r} selects no layer of the student, which has 0 to {student_depth - 1}"
        )
    students = [pair.student for pair in pairs]
    for student in students:
        if students.count(student) > 1:
            raise TransferError(
                f"transfer.layers={layers!r} names layer {student} of the student more than once; "
                f"name each of 0 to {student_depth - 1} at most once"
            )
    return tuple(sorted(pairs, key=lambda pair: pair.student))


def spread_layer(student: int, teacher_depth: int, student_depth: int) -> int:
    """Return the teacher layer for a student layer: t = ceil((s + 1) L_t / L_s) - 1.

    Layers are spread evenly, the last learns from the last, and with equal depth layer i learns from layer i.
    """
    return -(-(student + 1) * teacher_depth // student_depth) - 1


def _stages(
    text: str, teacher_depths: Sequence[int], student_depths: Sequence[int]
) -> list[int] | list[tuple[int, int]]:
    """Return the layers of `stage3` or `stage3.0-1`, or the pairs of `stage2>stage3`."""
    layers: list[int] = []
    pairs: list[tuple[int, int]] = []
    for item in re.sub(r"\s", "", text).split(","):
        theirs, _, ours = item.rpartition(">")
        student = _stage(ours, student_depths, "student", text)
        if not theirs:
            layers += student
            continue
        teacher = _stage(theirs, teacher_depths, "teacher", text)
        pairs += [
            (teacher[spread_layer(place, len(teacher), len(student))], layer)
            for place, layer in enumerate(student)
        ]
    if layers and pairs:
        raise TransferError(
            f"transfer.layers={text!r} mixes stages and pairs of stages: write each as a pair, such as stage2>stage2"
        )
    return layers or pairs


def _stage(word: str, depths: Sequence[int], owner: str, text: str) -> range:
    """Return the layers of `stage3`, which is numbered from 1 as in papers, or of `stage3.0-1`."""
    found = STAGE.fullmatch(word)
    assert found is not None
    number = int(found[1])
    if not 1 <= number <= len(depths):
        raise TransferError(
            f"transfer.layers={text!r} names {word} of the {owner}, which has stage1 to stage{len(depths)}; {ANOTHER}"
        )
    start, size = sum(depths[: number - 1]), depths[number - 1]
    first, last = (0, size - 1) if found[2] is None else (int(found[2]), int(found[3] or found[2]))
    if not first <= last < size:
        raise TransferError(
            f"transfer.layers={text!r} names {word} of the {owner}, whose stage{number} has layers 0 to {size - 1}; "
            f"{ANOTHER}"
        )
    return range(start + first, start + last + 1)


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


def _parse(text: str, depth: int) -> list[int] | list[tuple[int, int]]:
    compact = re.sub(r"\s", "", text)
    if compact == "all":
        return list(range(depth))
    if match := _COUNTED.fullmatch(compact):
        return _counted(match[1], int(match[2]), text, depth)
    if match := _RANGE.fullmatch(compact):
        return _range(match[1], match[2], text, depth)
    if _LIST.fullmatch(compact):
        return [int(number) for number in compact.split(",")]
    if _PAIRS.fullmatch(compact):
        sides = [pair.split(">") for pair in compact.split(",")]
        return [(int(teacher), int(student)) for teacher, student in sides]
    raise TransferError(f"transfer.layers={text!r} is not a choice of layers; valid: {GRAMMAR}")


ANOTHER = "give another --layers, such as all"


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
) -> LayerPair:
    teacher_depth, student_depth = sum(teacher_depths), sum(student_depths)
    if isinstance(item, int):
        student = _index(item, student_depth, "student", layers)
        return LayerPair(_spread(student, teacher_depths, student_depths), student)
    if len(item) != 2:
        raise TransferError(
            f"transfer.layers={layers!r} holds {item!r}; a pair is (teacher layer, student layer)"
        )
    return LayerPair(
        _index(item[0], teacher_depth, "teacher", layers), _index(item[1], student_depth, "student", layers)
    )


def _index(layer: int, depth: int, owner: str, layers: object) -> int:
    if not -depth <= layer < depth:
        raise TransferError(
            f"transfer.layers={layers!r} names layer {layer} of the {owner}, which has 0 to {depth - 1} "
            f"(or {-depth} to -1 from the end); {ANOTHER}"
        )
    return layer % depth


# What a pair of layers means for a method: their heads and tokens, or a refusal by name.


def resolve_links(
    config: LossConfig, method: TransferMethod, teacher: nn.Module, student: nn.Module
) -> tuple[tuple[Link, ...], GridRule]:
    """Return the pairs of layers with their heads and tokens, and the grids that a batch must have for them.

    Raises TransferError: the layers of a pair do not fit the method.
    """
    theirs, ours = sites(teacher), sites(student)
    pairs = resolve_layers(config.layers, depths(teacher), depths(student))
    stages = tuple(dict.fromkeys((theirs[pair.teacher].stage, ours[pair.student].stage) for pair in pairs))
    rule = GridRule(
        copy=method.equal_grids,
        interpolate=config.interpolate_grid,
        relative_bias=_has_bias(teacher, [theirs[pair.teacher] for pair in pairs]),
        stages=stages,
        method=None if method.copies else method.name,
    )
    links = []
    for pair in pairs:
        t, s = theirs[pair.teacher], ours[pair.student]
        if method.uses_heads:
            _check_attention(config, method, (teacher, t), (student, s))
        try:
            tokens = match_tokens(layout_of(teacher, t), layout_of(student, s), rule)
        except TransferError as error:
            if is_pyramid(teacher) or is_pyramid(student):
                raise TransferError(
                    f"layers {pair.teacher}>{pair.student} (teacher>student): {error}"
                ) from error
            raise
        links.append(Link(pair, _heads(config, method, t, s), tokens, t, s))
    return tuple(links), rule


def _has_bias(teacher: nn.Module, used: list[Site]) -> bool:
    if not is_pyramid(teacher):
        return has_relative_bias(teacher)
    return any(has_bias(site.block(teacher).attn) for site in used)


def _check_attention(
    config: LossConfig,
    method: TransferMethod,
    teacher: tuple[nn.Module, Site],
    student: tuple[nn.Module, Site],
) -> None:
    """Raise TransferError: what the method takes from attention means different things in the two layers."""
    (model_t, t), (model_s, s) = teacher, student
    where = f"layer {s.index} of the student cannot learn from layer {t.index} of the teacher"
    for owner, site in (("teacher", t), ("student", s)):
        if site.num_heads == 0:
            raise TransferError(
                f"{where}: that of the {owner} has no attention; use block_output, or leave the layer out of "
                f"transfer.layers={config.layers!r}"
            )
    _check_widths(config, method, t, s)
    maps = LayerMaps.of(model_t, t), LayerMaps.of(model_s, s)
    reason = method.refuses(config, *maps)
    if reason is not None:
        raise TransferError(
            f"{where} by transfer.method={method.name}: {reason}; use attention_output, block_output, feature or "
            "logits, or other transfer.layers"
        )
    structures = [each.structure for each in maps]
    if config.heads == "match" and structures[0] != structures[1]:
        raise TransferError(
            f"transfer.heads='match' compares maps of one structure, and layer {t.index} of the teacher has maps "
            f"{structures[0]} and layer {s.index} of the student {structures[1]}; use mean or pairs such as 3>0,1>2"
        )
    grids = t.shape.geometry.grid, s.shape.geometry.grid
    partial = next((each for each in structures if not each.is_whole), None)
    if config.interpolate_grid and grids[0] != grids[1] and partial is not None:
        raise TransferError(
            f"{where}: the grids are {words(grids[0])} and {words(grids[1])}, and transfer.interpolate_grid "
            f"interpolates only maps of all tokens to all tokens, not maps {partial}"
        )


def _check_widths(config: LossConfig, method: TransferMethod, t: Site, s: Site) -> None:
    if t.head_dim == s.head_dim:
        return
    widths = (
        f"needs heads of one width, and the teacher's are {t.head_dim} wide and the student's {s.head_dim}"
    )
    if method.head_widths == "equal":
        raise TransferError(
            f"transfer.method={method.name} {widths}; use method=copy, or a student with head width {t.head_dim}"
        )
    if config.heads != "all" and method.head_widths == "equal if chosen":
        raise TransferError(
            f"transfer.heads={config.heads!r} with transfer.method={method.name} {widths}; use heads=all"
        )


def _heads(config: LossConfig, method: TransferMethod, teacher: Site, student: Site) -> HeadMap:
    if not method.uses_heads:
        return HeadMap(tuple((head,) for head in range(student.num_heads)), student.num_heads)
    if config.heads == "match":
        return _first_heads(teacher, student)
    if config.heads == "all" and method.joins_heads:
        # Tensors are compared with their heads joined, so equal counts do not matter.
        return HeadMap(tuple((head,) for head in range(student.num_heads)), student.num_heads)
    heads = resolve_heads(config.heads, teacher.num_heads, student.num_heads)
    if heads.is_grouped and not method.averages_heads(config):
        raise TransferError(
            f"transfer.heads={config.heads!r} averages maps of several heads, which transfer.method={config.method} "
            f"with transfer.loss={config.loss} cannot do; use copy, or distill with loss=ce (the same gradient)"
        )
    return heads


def _first_heads(teacher: Site, student: Site) -> HeadMap:
    """Any one-to-one map, to stand in until the heads are matched."""
    count = min(teacher.num_heads, student.num_heads)
    return HeadMap(tuple((h,) if h < count else None for h in range(student.num_heads)), teacher.num_heads)


# What a transfer configuration means for two given models: pairs of layers, heads and tokens, or a refusal.


@dataclass(frozen=True)
class TransferPlan:
    """The resolved pairs of layers, none for `feature` and `logits`."""

    method: str
    links: tuple[Link, ...]
    notes: tuple[str, ...]
    needs_calibration: bool = False
    grids: GridRule | None = None
    """Which patch grids of a batch go together; None where no tokens are matched."""
    tokens: Literal["pooled", "patches", "both"] = "pooled"
    """Features of whole models that a method compares."""

    @property
    def teacher_layers(self) -> set[int]:
        return {link.pair.teacher for link in self.links}

    def calibrated(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_input: ShownImages,
        images: Tensor | None,
    ) -> TransferPlan:
        """Heads assigned layer by layer by the distance of their maps on a batch of images."""
        if images is None:
            raise TransferError(
                "transfer.heads='match' is measured on a batch of images: give DualViT(calibration=images)"
            )
        tapes, grids = [], teacher_input.grids(images, self.grids)
        for model, layers, batch in (
            (teacher, self.teacher_layers, teacher_input(images)),
            (student, {link.pair.student for link in self.links}, images),
        ):
            tape = Tape(Step(grids))
            with evaluating(model):
                view_attention(model, layers, tape, ("q", "k"))(batch)
            tapes.append(tape)
        links = tuple(replace(link, heads=_matched(link, *tapes)) for link in self.links)
        return replace(self, links=links, needs_calibration=False)

    def describe(self) -> list[str]:
        """Return the plan in lines of text."""
        lines = [f"method: {self.method}"]
        if self.links:
            pairs = ", ".join(f"{link.pair.teacher}>{link.pair.student}" for link in self.links)
            lines.append(f"layers (teacher>student): {pairs}")
        if self.needs_calibration:
            lines.append("heads: matched on the first batch")
        elif self.links and find_method(self.method).uses_heads:
            lines.extend(_describe_heads(self.links))
        return [*lines, *self.notes]


def resolve_plan(config: LossConfig, teacher: nn.Module, student: nn.Module) -> TransferPlan:
    """Resolve layers, heads and tokens; raises `TransferError` where the two models do not fit the method."""
    method = find_method(config.method)
    if find_family(teacher) is None:
        if method.uses_layers:
            check_supported(teacher)
        return TransferPlan(config.method, (), (), tokens=config.tokens)
    notes = (report_mismatch(compare_models(teacher, student)),)
    if not method.uses_layers:
        return TransferPlan(config.method, (), notes, tokens=config.tokens)
    _check_student(method, student)
    links, rule = resolve_links(config, method, teacher, student)
    report = dict.fromkeys(line for link in links for line in link.tokens.report)
    needs_calibration = config.heads == "match" and method.uses_heads
    return TransferPlan(config.method, links, (*report, *notes), needs_calibration, rule)


def _matched(link: Link, teacher: Tape, student: Tape) -> HeadMap:
    t = take(link.resample(teacher), None, link.tokens.teacher)
    s = take(student.heads[link.pair.student], None, link.tokens.student)
    distance = map_distance(*t.qk(), *s.qk(), t.scale, s.scale, bias_t=t.bias, bias_s=s.bias)
    return match_heads(distance)


def _check_student(method: TransferMethod, student: nn.Module) -> None:
    if method.whole_maps and any(map(_drops_probabilities, blocks_of(student))):
        raise TransferError(
            "student.model_args.attn_drop_rate must be 0: a dropped-out map is not the map that is transferred"
        )
    drop = getattr(student, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise TransferError(
            f"student.model_args.patch_drop_rate must be 0 for transfer.method={method.name}: a dropped patch has no "
            "counterpart in the teacher"
        )


def _drops_probabilities(block: Block) -> bool:
    return getattr(getattr(block.attn, "attn_drop", None), "p", 0) > 0


def _describe_heads(links: tuple[Link, ...]) -> list[str]:
    if any(link.heads.teacher_heads != link.teacher.num_heads for link in links):
        return []  # the method joins heads, so that their numbers do not matter
    if all(link.heads.is_identity for link in links):
        if len({len(link.heads.groups) for link in links}) > 1:
            return ["heads: all of each layer, one to one"]
        return [f"heads: all {len(links[0].heads.groups)}, one to one"]
    texts = {link.pair.student: _describe_head_map(link.heads) for link in links}
    if len(set(texts.values())) == 1:
        return [f"heads (teacher>student): {texts[links[0].pair.student]}"]
    return [f"heads of layer {layer} (teacher>student): {text}" for layer, text in texts.items()]


def _describe_head_map(heads: HeadMap) -> str:
    groups = zip(heads.targets, heads.student_heads, strict=True)
    return ", ".join(f"{'+'.join(map(str, group))}>{head}" for group, head in groups)
