"""What a transfer method is: what it needs, what it reads, how it is put into a student, and how it is described.

A method is one instance of `TransferMethod` in a file of its own. Nothing else compares names of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...models.conversion import ConvertedAttention
from ...models.copying.copying_operators import Part, Taught
from ...models.copying.links import Link
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import view_attention
from ...models.errors import TransferError
from ...models.host import AttentionHost, host_attention
from ...models.json_types import Json
from ..config import TransferConfig
from .lessons import Changes
from .transfer_plan import TransferPlan

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
    """What a method made: the teacher as the step runs it, extra modules, and losses of the student's logits."""

    view: nn.Module
    projectors: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    finish: Finish | None = None


class TransferMethod(ABC):
    """A way to learn from a frozen teacher."""

    name: str
    """The value of `transfer.method`."""
    words: str
    """What it does, as a model card says it; `{loss}` and `{feature_loss}` are those of the settings."""
    uses_layers: bool = True
    """Whether it works on pairs of layers (`transfer.layers`), and needs the same tokens in both models."""
    uses_heads: bool = False
    """Whether it works within attention: it reads `transfer.heads`, and needs a teacher with softmax attention."""
    joins_heads: bool = True
    """Whether `heads=all` compares the heads as one tensor, so that both models may have different numbers of them."""
    head_widths: Literal["any", "equal", "equal if chosen"] = "equal if chosen"
    """Which heads must have one width in both models: no heads, all heads, or those that `transfer.heads` names."""
    whole_maps: bool = False
    """Whether dropout of attention probabilities would spoil it."""
    equal_grids: bool = False
    """Whether it takes something of each patch that cannot be interpolated."""
    copies: bool = False
    """Whether the student computes with parts of its teacher: it has no loss of its own, needs its teacher for ever,
    and leaves some of its own parameters unused."""
    teaches_classes: bool = False
    """Whether the student's head learns the teacher's classes, which must be those of the data set."""
    nears_features: bool = False
    """Whether the distance of the features says how far the student is."""
    temperature: bool = False
    """Whether it reads `transfer.temperature`."""

    @property
    def loss_within_blocks(self) -> bool:
        """Whether blocks of the student give losses while they run."""
        return self.uses_layers and not self.copies

    def averages_heads(self, config: TransferConfig) -> bool:
        """Whether a head of the student can learn from several of the teacher."""
        return False

    @abstractmethod
    def install(self, pairing: Pairing) -> Installed:
        """Make the student of `pairing` run this method."""

    def describe(self, settings: Json) -> str:
        """What it does with these settings of the section `transfer`, as a model card says it."""
        losses = {
            name: LOSSES.get(str(settings.get(name)), "a distance") for name in ("loss", "feature_loss")
        }
        return self.words.format(**losses)


LOSSES = {
    "ce": "cross-entropy",
    "kl": "KL divergence",
    "cosine": "cosine distance",
    "smooth_l1": "smooth L1",
}
"""Values of `transfer.loss` and `transfer.feature_loss` in words."""


class AttentionMethod(TransferMethod):
    """A method whose losses, or whose copies, are of single attention layers: an operator in each layer."""

    uses_heads = True
    parts: tuple[Part, ...] = ("q", "k")
    """What the teacher's layers keep."""
    keeps_output: bool = False
    """Whether they keep what their heads put out, too."""

    @abstractmethod
    def operator(self, pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> Taught:
        """What the student's layer of `link` runs; modules that learn with it are added to `projectors`."""

    def install(self, pairing: Pairing) -> Installed:
        tape, changes = pairing.tape, pairing.changes
        layers = pairing.plan.teacher_layers
        installed = Installed(view_attention(pairing.teacher, layers, tape, self.parts, self.keeps_output))
        hosts = host_attention(pairing.student)
        for link in pairing.plan.links:
            host = hosts[link.pair.student]
            operator = self.operator(pairing, link, installed.projectors)
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


class Watching(Taught):
    """The operator of a method that only looks at what a layer puts out: any layer can have it."""

    @abstractmethod
    def compare(self, out_BHND: Tensor) -> None:
        """Record the error of the student's output, of whichever operator it is."""

    def watch(self, module: nn.Module, inputs: object, out: Tensor) -> None:
        """As a forward hook of a converted layer's operator: `compare`, while the teacher's side is on the tape."""
        if self.tape.active:
            self.compare(out)


def _watch_converted(host: ConvertedAttention, link: Link, operator: Taught) -> RemovableHandle:
    """A converted layer keeps its own operator; only what comes out of it can be matched."""
    if not isinstance(operator, Watching):
        raise TransferError(
            f"layer {link.pair.student} of the student has {host.choice} in place of softmax attention: use mode=align "
            "for its map, or transfer.method attention_output, block_output, feature or logits"
        )
    return host.operator.register_forward_hook(operator.watch)


def joined_projector(pairing: Pairing, link: Link, projectors: nn.ModuleDict) -> nn.Module | None:
    """The projector for the joined heads of a layer; None where chosen heads, of one width, are compared one by one."""
    if pairing.config.heads != "all":
        return None
    student, teacher = pairing.plan.student, pairing.plan.teacher
    widths = [shape.num_heads * shape.head_dim for shape in (student, teacher)]
    return projector(projectors, link, *widths, joined=student.num_heads != teacher.num_heads)


def projector(
    projectors: nn.ModuleDict, link: Link, student: int, teacher: int, *, joined: bool = False
) -> nn.Module | None:
    """A learned linear map from the student's width to the teacher's, where they differ."""
    if student == teacher:
        return nn.Identity() if joined else None
    name = f"layer{link.pair.student:02d}"
    projectors[name] = nn.Linear(student, teacher)
    return projectors[name]


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
