"""What a transfer method is: what it needs, what it reads, how it is put into a student, and how it is described.

A method is one instance of `TransferMethod` in a file of its own. Nothing else compares names of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.copying_operators import Copy, Part
from ...models.copying.grids import GridRule
from ...models.copying.tape import HeadMap, Link, Step, Tape, take
from ...models.copying.teacher_view import ShownImages, view_attention
from ...models.copying.teacher_view import Wanted as Wanted
from ...models.errors import Json, TransferError
from ...models.families import evaluating
from ...models.host import AttentionHost
from ...models.parts import num_classes
from ..loss_config import LossConfig
from .heads import map_distance, match_heads
from .map_loss import LayerMaps
from .method_facts import facts_of
from .standardize import Measured
from .taught_layer import Changes, Observer, attach

Finish = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Pairing:
    """A teacher and a student, and what is to happen between them."""

    config: LossConfig
    plan: TransferPlan
    teacher: nn.Module
    student: nn.Module
    tape: Tape
    """Record of the teacher's side, for the student's layers."""
    changes: Changes
    """List of all changes to the student; a method adds its own."""
    hosts: Mapping[int, AttentionHost] = field(default_factory=dict)
    """The hosts of the student's attention layers by number, for a method with `uses_heads`."""
    prefix: str = ""
    """Start of the names of its losses; empty for a single loss."""

    def loss_name(self, link: Link) -> str:
        """Return the name of the loss of a pair of layers."""
        return f"{self.prefix}layer{link.pair.student:02d}"


@dataclass
class Installed:
    """What a method made: modules that learn with the student, and the losses of its logits, by name."""

    projectors: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    finish: Finish | None = None
    labelled: Callable[[], Tensor] | None = None
    """Function for the logits of a step that learn from labels; None for the student's prediction."""
    measured: list[Measured] = field(default_factory=list)
    """Statistics that are measured on training images before the first step."""


class TransferMethod(ABC):
    """A way to learn from a frozen teacher."""

    name: str
    """The value of `transfer.method`."""
    words: str
    """Description for a model card; settings such as `{loss}` and `{feature_loss}` are filled in."""
    uses_layers: bool = True
    """Work on pairs of layers (`transfer.layers`), which needs the same tokens in both models."""
    uses_heads: bool = False
    """Work within attention: it reads `transfer.heads`, and needs a teacher with softmax attention."""
    joins_heads: bool = True
    """Comparison of all heads as one tensor for `heads=all`, so that the models may differ in their number."""
    head_widths: Literal["any", "equal", "equal if chosen"] = "equal if chosen"
    """Heads that must have one width in both models: none, all, or those that `transfer.heads` names."""
    whole_maps: bool = False
    """Need of whole attention maps, which dropout of probabilities would spoil."""
    equal_grids: bool = False
    """Need of equal grids, because what it takes of each patch cannot be interpolated."""
    teaches_classes: bool = False
    """A student's head that learns the teacher's classes, which must be those of the data set."""
    nears_features: bool = False
    """A student whose progress the distance of the features measures."""

    @property
    def reads(self) -> frozenset[str] | None:
        """Settings of a loss that it reads; a method of another package states them as a class attribute."""
        return facts_of(self.name).reads

    @property
    def copies(self) -> bool:
        """A student that computes with parts of its teacher; a class attribute in another package."""
        return facts_of(self.name).copies

    @property
    def loss_within_blocks(self) -> bool:
        """Whether blocks of the student give losses while they run."""
        return self.uses_layers and not self.copies

    def check_pairing(self, pairing: Pairing) -> None:
        """Raise TransferError where it teaches classes, and the two models differ in their number."""
        if not self.teaches_classes:
            return
        classes = [num_classes(model) for model in (pairing.teacher, pairing.student)]
        if classes[0] != classes[1] or classes[0] == 0:
            raise TransferError(
                f"transfer.method={self.name} needs one set of classes, and the teacher has {classes[0]} and the "
                f"student {classes[1]}; use a teacher fine-tuned on this data, or method=feature"
            )

    def loss_names(self, settings: LossConfig) -> tuple[str, ...]:
        """Return the names of its losses, which are added, where it compares the results of whole models."""
        return (self.name,)

    def refuses(self, config: LossConfig, teacher: LayerMaps, student: LayerMaps) -> str | None:
        """Return why the attention of two layers does not mean the same to this method; None where it does."""
        return None

    def averages_heads(self, config: LossConfig) -> bool:
        """Return whether a head of the student can learn from several of the teacher."""
        return False

    @abstractmethod
    def wanted(self, plan: TransferPlan) -> Wanted:
        """Return what a step needs of the teacher, which it then finds on the tape of the pairing."""

    @abstractmethod
    def install(self, pairing: Pairing) -> Installed:
        """Make the student of `pairing` run this method."""

    def describe(self, settings: Json) -> str:
        """Say what it does with these settings of the section `transfer`, for a model card."""
        names = ("loss", "feature_loss", "logits_loss")
        given = {name: settings.get(name, LossConfig.model_fields[name].default) for name in names}
        losses = {name: LOSSES.get(str(value), "a distance") for name, value in given.items()}
        return self.words.format(**losses)


LOSSES = {
    "ce": "cross-entropy",
    "kl": "KL divergence",
    "cosine": "cosine distance",
    "smooth_l1": "smooth L1",
    "mse": "mean squared error",
    "hard": "hard-label cross-entropy",
}
"""Values of `transfer.loss`, `transfer.feature_loss` and `transfer.logits_loss` in words."""


class AttentionMethod(TransferMethod):
    """A method whose losses, or whose copies, are of single attention layers: an operator in each layer."""

    uses_heads = True
    parts: tuple[Part, ...] = ("q", "k")
    """Parts that the teacher's layers keep."""
    keeps_output: bool = False
    """The output of the heads, kept too."""

    @abstractmethod
    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Copy | Observer:
        """Return what the student's layer of `link` copies, or its loss; add what learns with it to `projectors`."""

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted.attention(plan.teacher_layers, self.parts, output=self.keeps_output)

    def install(self, pairing: Pairing) -> Installed:
        installed = Installed()
        for link in pairing.plan.links:
            part = self.operator(pairing, link, installed.projectors)
            attach(pairing.hosts[link.pair.student], part, self.name, pairing.changes)
        return installed


def joined_projector(pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> nn.Module | None:
    """Return the projector for the joined heads of a layer; None where heads are chosen, which have one width."""
    if pairing.config.heads != "all":
        return None
    widths = [site.num_heads * site.head_dim for site in (link.student, link.teacher)]
    joined = link.student.num_heads != link.teacher.num_heads
    return projector(projectors, link, *widths, joined=joined)


def projector(
    projectors: nn.ModuleDict, link: Link, student: int, teacher: int, *, joined: bool = False
) -> nn.Module | None:
    """Return a learned linear map from the student's width to the teacher's, where they differ."""
    if student == teacher:
        return nn.Identity() if joined else None
    name = f"layer{link.pair.student:02d}"
    projectors[name] = nn.Linear(student, teacher)
    return projectors[name]


# The error of two tensors, for methods that compare outputs.


def squared_error(
    student: Tensor, teacher: Tensor, projector: nn.Module | None, inside_BN: Tensor | None = None
) -> Tensor:
    """Mean squared error over all elements, or those of the tokens that are `inside` their images, in float32.

    Tensors are (B, N, C), or heads (B, H, N, D), which are joined where a projector changes the width.
    """
    if projector is not None:
        student, teacher = projector(student.transpose(1, 2).flatten(2)), teacher.transpose(1, 2).flatten(2)
    student = precise(student)
    teacher = teacher.to(student.dtype)
    if inside_BN is None:
        return F.mse_loss(student, teacher)
    error = F.mse_loss(student, teacher, reduction="none").mean(-1)
    weight = (inside_BN if error.dim() == 2 else inside_BN[:, None]).to(error.dtype).expand_as(error)
    return (error * weight).sum() / weight.sum()


# The resolved pairs of a method: what it runs on, and how a plan says so.


@dataclass(frozen=True)
class TransferPlan:
    """The resolved pairs of layers, none for `feature` and `logits`."""

    method: TransferMethod
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
        lines = [f"method: {self.method.name}"]
        if self.links:
            pairs = ", ".join(f"{link.pair.teacher}>{link.pair.student}" for link in self.links)
            lines.append(f"layers (teacher>student): {pairs}")
        if self.needs_calibration:
            lines.append("heads: matched on the first batch")
        elif self.links and self.method.uses_heads:
            lines.extend(_describe_heads(self.links))
        return [*lines, *self.notes]


def _matched(link: Link, teacher: Tape, student: Tape) -> HeadMap:
    t = take(link.resample(teacher), None, link.tokens.teacher)
    s = take(student.heads[link.pair.student], None, link.tokens.student)
    distance = map_distance(*t.qk(), *s.qk(), t.scale, s.scale, bias_t=t.bias, bias_s=s.bias)
    return match_heads(distance)


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
