"""What a transfer configuration means for two given models: pairs of layers, heads and tokens, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ...models.copying.grids import GridRule
from ...models.copying.input import ShownImages
from ...models.copying.links import HeadMap, Link
from ...models.copying.tape import Step, Tape, take
from ...models.copying.teacher_view import view_attention
from ...models.copying.tokens import match_tokens
from ...models.errors import TransferError
from ...models.families import (
    AttentionShape,
    attention_blocks,
    attention_shape,
    check_supported,
    evaluating,
    has_relative_bias,
    is_supported,
    token_layout,
)
from ..config import LossConfig
from .heads import map_distance, match_heads, resolve_heads
from .mismatch import compare_models, report_mismatch
from .pairs import resolve_layers
from .registry import find_method


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
        """The plan in lines of text."""
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
    if not is_supported(teacher):
        if method.uses_layers:
            check_supported(teacher)
        return TransferPlan(config.method, (), (), tokens=config.tokens)
    shapes = attention_shape(teacher), attention_shape(student)
    notes = (report_mismatch(compare_models(teacher, student)),)
    if not method.uses_layers:
        return TransferPlan(config.method, (), notes, tokens=config.tokens)
    _check_method(config, student, *shapes)
    rule = GridRule(
        copy=method.equal_grids,
        interpolate=config.interpolate_grid,
        relative_bias=has_relative_bias(teacher),
    )
    tokens = match_tokens(token_layout(teacher), token_layout(student), rule)
    needs_calibration = config.heads == "match" and method.uses_heads
    heads = _first_heads(config, *shapes) if needs_calibration else _heads(config, *shapes)
    links = tuple(
        Link(pair, heads, tokens) for pair in resolve_layers(config.layers, shapes[0].depth, shapes[1].depth)
    )
    return TransferPlan(config.method, links, (*tokens.report, *notes), needs_calibration, rule)


def _heads(config: LossConfig, teacher: AttentionShape, student: AttentionShape) -> HeadMap:
    method = find_method(config.method)
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


def _first_heads(config: LossConfig, teacher: AttentionShape, student: AttentionShape) -> HeadMap:
    """Any one-to-one map, to stand in until the heads are matched."""
    count = min(teacher.num_heads, student.num_heads)
    return HeadMap(tuple((h,) if h < count else None for h in range(student.num_heads)), teacher.num_heads)


def _matched(link: Link, teacher: Tape, student: Tape) -> HeadMap:
    t = take(link.resample(teacher), None, link.tokens.teacher)
    s = take(student.heads[link.pair.student], None, link.tokens.student)
    distance = map_distance(*t.qk(), *s.qk(), t.scale, s.scale, bias_t=t.bias, bias_s=s.bias)
    return match_heads(distance)


def _check_method(config: LossConfig, student: nn.Module, t: AttentionShape, s: AttentionShape) -> None:
    method = find_method(config.method)
    if t.head_dim != s.head_dim:
        widths = f"needs heads of one width, and the teacher's are {t.head_dim} wide and the student's {s.head_dim}"
        if method.head_widths == "equal":
            raise TransferError(
                f"transfer.method={method.name} {widths}; use method=copy, or a student with head width {t.head_dim}"
            )
        if config.heads != "all" and method.head_widths == "equal if chosen":
            raise TransferError(
                f"transfer.heads={config.heads!r} with transfer.method={method.name} {widths}; use heads=all"
            )
    if method.whole_maps and any(block.attn.attn_drop.p > 0 for block in attention_blocks(student)):
        raise TransferError(
            "student.model_args.attn_drop_rate must be 0: a dropped-out map is not the map that is transferred"
        )
    drop = getattr(student, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise TransferError(
            f"student.model_args.patch_drop_rate must be 0 for transfer.method={method.name}: a dropped patch has no "
            "counterpart in the teacher"
        )


def _describe_heads(links: tuple[Link, ...]) -> list[str]:
    if all(link.heads.is_identity for link in links):
        return [f"heads: all {len(links[0].heads.groups)}, one to one"]
    texts = {link.pair.student: _describe_head_map(link.heads) for link in links}
    if len(set(texts.values())) == 1:
        return [f"heads (teacher>student): {texts[links[0].pair.student]}"]
    return [f"heads of layer {layer} (teacher>student): {text}" for layer, text in texts.items()]


def _describe_head_map(heads: HeadMap) -> str:
    groups = zip(heads.targets, heads.student_heads, strict=True)
    return ", ".join(f"{'+'.join(map(str, group))}>{head}" for group, head in groups)
