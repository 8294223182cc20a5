"""How each method is put into a student: which operator its layers run, what the teacher must give, what is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...models.conversion import ConvertedAttention
from ...models.copying.links import Link
from ...models.copying.operators import COPY_METHODS, Part, Taught, copy_operator, teacher_parts
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import view_attention, view_blocks, view_whole
from ...models.errors import TransferError
from ...models.host import AttentionHost, host_attention
from ..config import TransferConfig
from .lessons import Changes
from .map_loss import MapLoss
from .operators import DistillMap, DistillProjection, MatchOutput, squared_error
from .plan import DISTILL_PARTS, TransferPlan

HEADS = ("head", "head_dist")

Finish = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Pairing:
    """A teacher and a student, and what is to happen between them."""

    config: TransferConfig
    plan: TransferPlan
    teacher: nn.Module
    student: nn.Module
    tape: Tape
    """From which the student's layers read the teacher's side."""
    changes: Changes
    """What was changed in the student, which is added to."""


@dataclass
class Installed:
    """What `install` made: the teacher as the step runs it, extra modules, and losses of the student's logits."""

    view: Any
    projectors: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    finish: Finish | None = None


def install(pairing: Pairing) -> Installed:
    """Make the student's layers run the method of `pairing.config`."""
    method = pairing.config.method
    whole = {"block_output": _install_block_output, "feature": _install_feature, "logits": _install_logits}
    return whole.get(method, _install_attention)(pairing)


def _install_attention(pairing: Pairing) -> Installed:
    method, tape, changes = pairing.config.method, pairing.tape, pairing.changes
    output = method == "attention_output"
    parts = teacher_parts(method) if method in COPY_METHODS else tuple(DISTILL_PARTS.get(method, "qk"))
    installed = Installed(view_attention(pairing.teacher, pairing.plan.teacher_layers, tape, parts, output))
    hosts = host_attention(pairing.student)
    for link in pairing.plan.links:
        host = hosts[link.pair.student]
        operator = _operator(pairing, link, installed.projectors)
        if isinstance(host, ConvertedAttention):
            changes.hooks.append(_watch_converted(host, link, operator))
            continue
        host.operator = operator
        changes.frozen += _freeze_unused(host, operator)
    if not any(
        {"q", "k"} & set(getattr(host.operator, "taught_needs", host.operator.needs)) for host in hosts
    ):
        changes.frozen += _freeze(getattr(pairing.student, "rel_pos_bias", None))
    return installed


def _watch_converted(host: ConvertedAttention, link: Link, operator: Taught) -> RemovableHandle:
    """A converted layer keeps its own operator; only what comes out of it can be matched."""
    if not isinstance(operator, MatchOutput):
        raise TransferError(
            f"layer {link.pair.student} of the student has {host.choice} in place of softmax attention: use mode=align "
            "for its map, or transfer.method attention_output, block_output, feature or logits"
        )
    return cast(nn.Module, host.operator).register_forward_hook(operator.watch)


def _operator(pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Taught:
    config, plan, tape = pairing.config, pairing.plan, pairing.tape
    method = config.method
    if method in COPY_METHODS:
        return copy_operator(method, link, tape)
    if method == "distill":
        loss = MapLoss(config.loss == "kl", config.temperature, config.rows)
        return DistillMap(link, tape, loss=loss)
    projector = None
    if config.heads == "all":  # chosen heads are of one width, and compared one by one
        widths = [shape.num_heads * shape.head_dim for shape in (plan.student, plan.teacher)]
        joined = plan.student.num_heads != plan.teacher.num_heads
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


def _install_block_output(pairing: Pairing) -> Installed:
    plan, tape = pairing.plan, pairing.tape
    installed = Installed(view_blocks(pairing.teacher, plan.teacher_layers, tape))
    blocks = cast(Any, pairing.student).blocks
    for link in plan.links:
        projector = _projector(installed.projectors, link, plan.student.width, plan.teacher.width)
        match = _MatchBlock(link, tape, projector)
        pairing.changes.hooks.append(blocks[link.pair.student].register_forward_hook(match))
    return installed


def _install_feature(pairing: Pairing) -> Installed:
    """The pooled feature before the head; DeiT's two heads read two tokens, and their mean is the feature."""
    teacher, student, tape = pairing.teacher, pairing.student, pairing.tape
    view = view_whole(teacher)
    for name in HEADS:
        if name in view._modules:
            view._modules[name] = nn.Identity()
    installed = Installed(_Recorded(view, tape))
    for name in HEADS:
        head = student._modules.get(name)
        if head is not None:
            pairing.changes.hooks.append(head.register_forward_pre_hook(_KeepInput(tape, name)))
    widths = int(cast(Any, student).num_features), int(cast(Any, teacher).num_features)
    if widths[0] != widths[1]:
        installed.projectors["feature"] = nn.Linear(*widths)
    installed.finish = _FeatureLoss(tape, pairing.config.feature_loss, installed.projectors)
    return installed


def _install_logits(pairing: Pairing) -> Installed:
    teacher, tape = pairing.teacher, pairing.tape
    classes = [int(cast(Any, model).num_classes) for model in (teacher, pairing.student)]
    if classes[0] != classes[1] or classes[0] == 0:
        raise TransferError(
            f"transfer.method=logits needs one set of classes, and the teacher has {classes[0]} and the student "
            f"{classes[1]}; use a teacher fine-tuned on this data, or method=feature"
        )
    return Installed(
        _Recorded(view_whole(teacher), tape), finish=_LogitsLoss(tape, pairing.config.temperature)
    )


@dataclass(eq=False)
class _MatchBlock:
    """A forward hook of a student's block: the error of its output."""

    link: Link
    tape: Tape
    projector: nn.Module | None

    def __call__(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        if not self.tape.active:
            return
        pair, tokens = self.link.pair, self.link.tokens
        student = tokens.student.pick(out, 1)
        teacher = tokens.teacher.pick(self.tape.outputs[pair.teacher], 1)
        if self.projector is not None:
            student = self.projector(student)
        self.tape.record(pair.student, squared_error(student, teacher, None))


@dataclass(eq=False)
class _KeepInput:
    """A hook before a student's head: what goes into it is the feature."""

    tape: Tape
    name: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.tape.active:
            self.tape.features[self.name] = inputs[0]


@dataclass(eq=False)
class _FeatureLoss:
    tape: Tape
    loss: str
    projectors: nn.ModuleDict

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        if not self.tape.features:
            raise TransferError(
                "the student's head was not seen to run: it was compiled before it was taught, or replaced; wrap the "
                "plain model, and compile the DualViT"
            )
        student, teacher = torch.stack(list(self.tape.features.values())).mean(0), self.tape.outputs[0]
        if "feature" in self.projectors:
            student = self.projectors["feature"](student)
        student, teacher = _precise(student), _precise(teacher)
        if self.loss == "smooth_l1":
            return {"feature": F.smooth_l1_loss(student, teacher)}
        return {"feature": 1 - F.cosine_similarity(student, teacher, dim=-1).mean()}


@dataclass(eq=False)
class _LogitsLoss:
    tape: Tape
    temperature: float

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        target = F.log_softmax(_precise(self.tape.outputs[0]) / self.temperature, dim=-1)
        mine = F.log_softmax(_precise(logits) / self.temperature, dim=-1)
        loss = F.kl_div(mine, target, reduction="batchmean", log_target=True)
        return {"logits": loss * self.temperature**2}


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


def _freeze_unused(host: AttentionHost, operator: Taught) -> list[nn.Parameter]:
    """Freeze what a copied layer never uses, so that DDP does not wait for its gradient."""
    needs = operator.taught_needs
    frozen: list[nn.Parameter] = []
    for part in ("q", "k", "v"):
        if part not in needs:
            for name in (f"{part}_proj", f"{part}_norm"):
                frozen += _freeze(host._modules.get(name))
    if "q" not in needs and "k" not in needs:
        frozen += _freeze_parameters([host._parameters.get("relative_position_bias_table")])
    return frozen


def _freeze(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else _freeze_parameters(list(module.parameters()))


def _freeze_parameters(parameters: list[nn.Parameter | None]) -> list[nn.Parameter]:
    """Those that were not frozen before."""
    frozen = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen
