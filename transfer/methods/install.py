"""How each method is put into a student: which operator its layers run, what the teacher must give, what is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.conversion import ConvertedAttention
from ...models.copying.links import Link
from ...models.copying.operators import COPY_METHODS, Part, Taught, copy_operator, teacher_parts
from ...models.copying.tape import Tape, pick_dim
from ...models.copying.teacher_view import view_attention, view_blocks, view_whole
from ...models.errors import TransferError
from ...models.host import AttentionHost, host_attention
from ..config import TransferConfig
from .map_loss import MapLoss
from .operators import DistillMap, DistillProjection, MatchOutput, squared_error
from .plan import DISTILL_PARTS, TransferPlan

HEADS = ("head", "head_dist")

Undo = Callable[[], object]
Finish = Callable[[Tensor], dict[str, Tensor]]


@dataclass
class Installed:
    """What `install` did: the teacher as the step runs it, extra modules, and how to take it back."""

    view: Any
    projectors: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    finish: Finish | None = None  # losses that need the student's logits
    undo: list[Undo] = field(default_factory=list)


def install(
    config: TransferConfig, plan: TransferPlan, teacher: nn.Module, student: nn.Module, tape: Tape
) -> Installed:
    """Make the student's layers run the method, reading the teacher's side from `tape`."""
    method = config.method
    if method == "block_output":
        return _install_block_output(plan, teacher, student, tape)
    if method == "feature":
        return _install_feature(config, plan, teacher, student, tape)
    if method == "logits":
        return _install_logits(config, teacher, student, tape)
    output = method == "attention_output"
    parts = teacher_parts(method) if method in COPY_METHODS else tuple(DISTILL_PARTS.get(method, "qk"))
    installed = Installed(view_attention(teacher, plan.teacher_layers, tape, parts, output))
    hosts = host_attention(student)
    for link in plan.links:
        host = hosts[link.pair.student]
        operator = _operator(config, plan, link, tape, installed.projectors)
        if isinstance(host, ConvertedAttention):
            installed.undo.append(_watch_converted(host, link, operator))
            continue
        host.operator = operator
        installed.undo += _freeze_unused(host, operator)
    if method == "copy" and len(plan.links) == len(hosts):
        installed.undo += _freeze(getattr(student, "rel_pos_bias", None))
    return installed


def _watch_converted(host: ConvertedAttention, link: Link, operator: Taught) -> Undo:
    """A converted layer keeps its own operator; only what comes out of it can be matched."""
    if not isinstance(operator, MatchOutput):
        raise TransferError(
            f"layer {link.pair.student} of the student has {host.choice} in place of softmax attention: use mode=align "
            "for its map, or transfer.method attention_output, block_output, feature or logits"
        )
    return cast(nn.Module, host.operator).register_forward_hook(operator.watch).remove


def _operator(
    config: TransferConfig, plan: TransferPlan, link: Link, tape: Tape, projectors: nn.ModuleDict
) -> Taught:
    method = config.method
    if method in COPY_METHODS:
        return copy_operator(method, link, tape)
    if method == "distill":
        loss = MapLoss(config.loss == "kl", config.temperature, config.rows)
        return DistillMap(link, tape, loss=loss)
    widths = [shape.num_heads * shape.head_dim for shape in (plan.student, plan.teacher)]
    joined = config.heads == "all" and plan.student.num_heads != plan.teacher.num_heads
    projector = _projector(projectors, link, *widths, joined=joined)
    if method in DISTILL_PARTS:
        return DistillProjection(link, tape, part=cast(Part, DISTILL_PARTS[method]), projector=projector)
    return MatchOutput(link, tape, projector=projector)


def _projector(
    projectors: nn.ModuleDict, link: Link, student: int, teacher: int, *, joined: bool = False
) -> nn.Module | None:
    """A learned linear map from the student's width to the teacher's, where they differ."""
    if student == teacher:
        return nn.Identity() if joined else None
    name = f"layer{link.pair.student:02d}"
    projectors[name] = nn.Linear(student, teacher)
    return projectors[name]


def _install_block_output(
    plan: TransferPlan, teacher: nn.Module, student: nn.Module, tape: Tape
) -> Installed:
    installed = Installed(view_blocks(teacher, plan.teacher_layers, tape))
    blocks = cast(Any, student).blocks
    for link in plan.links:
        projector = _projector(installed.projectors, link, plan.student.width, plan.teacher.width)

        def match(
            module: nn.Module,
            inputs: object,
            out: Tensor,
            link: Link = link,
            projector: nn.Module | None = projector,
        ) -> None:
            if tape.active:
                student_tokens = pick_dim(out, 1, link.tokens.student)
                teacher_tokens = pick_dim(tape.outputs[link.pair.teacher], 1, link.tokens.teacher)
                if projector is not None:
                    student_tokens = projector(student_tokens)
                tape.losses[link.pair.student] = squared_error(student_tokens, teacher_tokens, None)

        installed.undo.append(blocks[link.pair.student].register_forward_hook(match).remove)
    return installed


def _install_feature(
    config: TransferConfig, plan: TransferPlan, teacher: nn.Module, student: nn.Module, tape: Tape
) -> Installed:
    """The pooled feature before the head; DeiT's two heads read two tokens, and their mean is the feature."""
    view = view_whole(teacher)
    for name in HEADS:
        if name in view._modules:
            view._modules[name] = nn.Identity()
    installed = Installed(_Recorded(view, tape))
    seen: dict[str, Tensor] = {}
    for name in HEADS:
        head = student._modules.get(name)
        if head is not None:
            hook = partial(_keep_input, seen, name)
            installed.undo.append(head.register_forward_pre_hook(hook).remove)
    widths = int(cast(Any, student).num_features), int(cast(Any, teacher).num_features)
    if widths[0] != widths[1]:
        installed.projectors["feature"] = nn.Linear(*widths)

    def finish(_: Tensor) -> dict[str, Tensor]:
        feature, target = torch.stack(list(seen.values())).mean(0), tape.outputs[0]
        seen.clear()
        if "feature" in installed.projectors:
            feature = installed.projectors["feature"](feature)
        return {"feature": _feature_loss(config, _precise(feature), _precise(target))}

    installed.finish = finish
    return installed


def _install_logits(config: TransferConfig, teacher: nn.Module, student: nn.Module, tape: Tape) -> Installed:
    classes = [int(cast(Any, model).num_classes) for model in (teacher, student)]
    if classes[0] != classes[1] or classes[0] == 0:
        raise TransferError(
            f"transfer.method=logits needs one set of classes, and the teacher has {classes[0]} and the student "
            f"{classes[1]}; use a teacher fine-tuned on this data, or method=feature"
        )
    temperature = config.temperature

    def finish(logits: Tensor) -> dict[str, Tensor]:
        target = F.log_softmax(_precise(tape.outputs[0]) / temperature, dim=-1)
        mine = F.log_softmax(_precise(logits) / temperature, dim=-1)
        loss = F.kl_div(mine, target, reduction="batchmean", log_target=True)
        return {"logits": loss * temperature**2}

    return Installed(_Recorded(view_whole(teacher), tape), finish=finish)


def _keep_input(seen: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[name] = inputs[0]


def _feature_loss(config: TransferConfig, student: Tensor, teacher: Tensor) -> Tensor:
    if config.feature_loss == "smooth_l1":
        return F.smooth_l1_loss(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Recorded(nn.Module):
    """A whole teacher whose output goes on the tape."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.tape = tape

    @property
    def blocks(self) -> nn.Module:
        blocks: nn.Module = cast(Any, self.model).blocks
        return blocks

    def forward(self, images: Tensor) -> None:
        self.tape.outputs[0] = self.model(images)


def _freeze_unused(host: AttentionHost, operator: Taught) -> list[Undo]:
    """Freeze what a copied layer never uses, so that DDP does not wait for its gradient."""
    needs = operator.taught_needs
    undo: list[Undo] = []
    for part in ("q", "k", "v"):
        if part not in needs:
            for name in (f"{part}_proj", f"{part}_norm"):
                undo += _freeze(host._modules.get(name))
    if "q" not in needs and "k" not in needs:
        undo += _freeze_parameters([host._parameters.get("relative_position_bias_table")])
    return undo


def _freeze(module: nn.Module | None) -> list[Undo]:
    return [] if module is None else _freeze_parameters(list(module.parameters()))


def _freeze_parameters(parameters: list[nn.Parameter | None]) -> list[Undo]:
    undo: list[Undo] = []
    for parameter in parameters:
        if parameter is not None and parameter.requires_grad:
            parameter.requires_grad_(False)
            undo.append(lambda p=parameter: p.requires_grad_(True))  # type: ignore[misc]
    return undo
