"""What a pair of layers means for a method: its heads and tokens, or a refusal."""

from __future__ import annotations

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
from ...models.pyramid_conversion import has_bias
from ..loss_config import LossConfig
from .heads import map_distance, match_heads, resolve_heads
from .layer_choice import choose_layers
from .map_loss import LayerMaps
from .mismatch import compare_models, report_mismatch
from .registry import find_method

if TYPE_CHECKING:
    from .method import TransferMethod


def resolve_layers(
    layers: str | Sequence[int] | Sequence[tuple[int, int]],
    teacher_depths: Sequence[int],
    student_depths: Sequence[int],
) -> tuple[LayerPair, ...]:
    """Return the pairs of blocks for `layers` as `choose_layers` does."""
    return tuple(LayerPair(*pair) for pair in choose_layers(layers, teacher_depths, student_depths))


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
    """Rule of the patch grids of a batch that go together; None if no tokens are matched."""
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
