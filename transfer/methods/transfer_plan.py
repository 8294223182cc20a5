"""What a transfer configuration means for two given models: pairs of layers, heads and tokens, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from ...models.copying.grids import GridRule
from ...models.copying.tape import HeadMap, Link, Step, Tape, take
from ...models.copying.teacher_view import ShownImages, view_attention
from ...models.errors import TransferError
from ...models.families import Block, blocks_of, check_supported, evaluating, find_family
from ..config import LossConfig
from .heads import map_distance, match_heads
from .layer_links import resolve_links
from .mismatch import compare_models, report_mismatch
from .registry import find_method

if TYPE_CHECKING:
    from .method import TransferMethod


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
