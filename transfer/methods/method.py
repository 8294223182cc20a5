"""What a transfer method is: what it needs, what it reads, how it is put into a student, and how it is described.

A method is one instance of `TransferMethod` in a file of its own. Nothing else compares names of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.markdown import code
from ...checkpoints.publish.card import Rows, number
from ...models.attention.kernels import precise
from ...models.copying.copying_operators import Copy, Part
from ...models.copying.tape import Link, Tape
from ...models.copying.teacher_view import Wanted as Wanted
from ...models.errors import Json, TransferError
from ...models.families import vit
from ...models.host import AttentionHost
from ..loss_config import LossConfig
from .lessons import Changes
from .map_loss import LayerMaps
from .method_facts import facts_of, method_names
from .pairs import TransferPlan
from .registry import find_method
from .standardize import Measured
from .taught_layer import Observer, attach

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
        classes = [vit(model).num_classes for model in (pairing.teacher, pairing.student)]
        if classes[0] != classes[1] or classes[0] == 0:
            raise TransferError(
                f"transfer.method={self.name} needs one set of classes, and the teacher has {classes[0]} and the "
                f"student {classes[1]}; use a teacher fine-tuned on this data, or method=feature"
            )

    def keeps_vectors(self, settings: LossConfig) -> bool:
        """Return whether it needs only one vector an image of its teacher, which `transfer.cache` can keep."""
        return False

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


# The section `transfer` of a recipe, in the words of a model card.


def describe_transfer(settings: Json) -> Rows:
    """Describe method, layers, heads and weight of each loss; the name alone of a method that is not registered."""
    losses = settings.get("losses")
    entries = [entry for entry in losses if isinstance(entry, Mapping)] if isinstance(losses, list) else []
    if not entries:
        return _describe_loss(settings)
    rows: Rows = []
    for number_of_loss, entry in enumerate(entries, start=1):
        found = [*_describe_loss(entry)]
        if entry.get("teacher"):
            found.insert(1, ("from", code(entry["teacher"])))
        rows += [(f"loss {number_of_loss}: {name}", text) for name, text in found]
    return rows


def _describe_loss(settings: Json) -> Rows:
    name = str(settings.get("method", ""))
    if name not in method_names():
        return [("method", f"{code(name)}: not described here")]
    method = find_method(name)
    rows = [("method", f"{code(name)}: {method.describe(settings)}")]
    if method.uses_layers and "layers" in settings:
        rows.append(("layers", _layers(settings["layers"])))
    if method.uses_heads and "heads" in settings:
        rows.append(("heads", _heads(settings["heads"])))
    if not method.copies and "weight" in settings:
        over = {"sum": ", summed over layers", "mean": ", averaged over layers"}
        rest = over.get(str(settings.get("reduction")), "") if method.uses_layers else ""
        rows.append(("weight of its loss", f"{number(settings['weight'])}{rest}"))
    if settings.get("temperature", 1.0) != 1.0:
        rows.append(("temperature", number(settings["temperature"])))
    return rows


def _layers(layers: object) -> str:
    kind, _, count = str(layers).partition(":")
    if layers == "all":
        return "all"
    if kind in ("first", "last") and count.isdigit():
        return f"the {kind} {count}"
    if kind == "every" and count.isdigit():
        return f"one in {count}, and the last"
    return _pairs(layers)


def _heads(heads: object) -> str:
    if heads == "mean":
        return "the means of groups of the teacher's heads"
    if heads == "match":
        return "all, each paired with a teacher's head by the least distance between maps"
    return "all" if heads == "all" else _pairs(heads)


def _pairs(chosen: object) -> str:
    """0,3,5, or teacher > student pairs, counted from 0."""
    items = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    text = ", ".join(
        ">".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item) for item in items
    )
    return code(text) + (" (teacher > student)" if ">" in text else "")


# The error of two tensors, for methods that compare outputs.


def squared_error(student: Tensor, teacher: Tensor, projector: nn.Module | None) -> Tensor:
    """Mean squared error over all elements, in float32; heads (B, H, N, D) are joined where a projector changes
    the width."""
    if projector is not None:
        student, teacher = projector(student.transpose(1, 2).flatten(2)), teacher.transpose(1, 2).flatten(2)
    student = precise(student)
    return F.mse_loss(student, teacher.to(student.dtype))
