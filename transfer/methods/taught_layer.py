"""One attention layer of a student that is taught: its own attention or a copy, and losses that look at it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn

from ...models.attention.base import QKV, Heads
from ...models.attention.fused import attention_with_lse
from ...models.attention.softmax import SoftmaxAttention
from ...models.conversion import ConvertedAttention
from ...models.copying.copying_operators import Copy, softmax
from ...models.copying.tape import Link, Tape
from ...models.errors import TransferError
from ...models.families.site import Handle
from ...models.host import BIAS, AttentionHost
from ...models.hosting import release_attention
from .drop_path import release_drop_paths
from .map_loss import window_attention

# Who teaches a student: one `DualViT` at a time, and never the student itself.


@dataclass
class Changes:
    """What a `DualViT` changed in its student beside the hosts of its attention and its drop paths."""

    hooks: list[Handle] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)


class _Lesson(NamedTuple):
    dual: ReferenceType[Any]
    changes: Changes


_lessons: WeakKeyDictionary[nn.Module, _Lesson] = WeakKeyDictionary()
_taught_by: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""The students of each teacher."""


def begin_lesson(
    teachers: Iterable[nn.Module], student: nn.Module, dual: nn.Module, changes: Changes
) -> None:
    """Note that `dual` teaches `student`, and what it changed in it."""
    _lessons[student] = _Lesson(ref(dual), changes)
    for teacher in teachers:
        _taught_by.setdefault(teacher, WeakSet()).add(student)


def end_lesson(model: nn.Module) -> None:
    """Put a model back as timm made it: its own attention, drop paths and gradients."""
    lesson = _lessons.pop(model, None)
    if lesson is not None:
        for hook in lesson.changes.hooks:
            hook.remove()
        for parameter in lesson.changes.frozen:
            parameter.requires_grad_(True)
    release_drop_paths(model)
    release_attention(model)


def check_free(teacher: nn.Module, student: nn.Module) -> None:
    """Raise `TransferError` where one of the two has another part in a `DualViT` in use, or both share weights."""
    shared = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in shared for parameter in student.parameters()):
        raise TransferError(
            "teacher and student share their weights, and a teacher is frozen: give the student weights of its own, "
            "such as copy.deepcopy(teacher)"
        )
    for role, model in (("student", student), ("teacher", teacher)):
        if _is_taught(model):
            raise TransferError(
                f"the {role} is the student of another DualViT, which would stop to teach it: call release() of that "
                "one first"
            )
    if any(_is_taught(other) for other in _taught_by.get(student, ())):
        raise TransferError(
            "the student is the teacher of another DualViT, and a teacher is frozen: give it weights of its own, such "
            "as copy.deepcopy(student).requires_grad_(True)"
        )


def _is_taught(model: nn.Module) -> bool:
    lesson = _lessons.get(model)
    return lesson is not None and lesson.dual() is not None


@dataclass
class Observer(ABC):
    """A loss of one attention layer. It sees the student's projections and output and changes neither."""

    link: Link
    tape: Tape
    name: str
    """Name under which the loss is recorded."""
    reads_projections: ClassVar[bool] = True
    """Need of the student's own softmax attention, not of the output alone."""

    @property
    def needs_lse(self) -> bool:
        """Whether it uses the log-sum-exp (B, H, N) of the student's attention logits."""
        return False

    @abstractmethod
    def look(self, heads: Heads | None, out_BHND: Tensor, lse_BHN: Tensor | None) -> None:
        """Record the loss of the layer.

        In a native layer with windows all tensors are by window, as `Heads.windows` says. `heads` is None where the
        layer has another operator than softmax.
        """

    def record(self, loss: Tensor) -> None:
        self.tape.record(self.name, loss)

    def watch(self, module: nn.Module, inputs: tuple[Heads, ...], out: Tensor) -> None:
        """Look at the output of a converted layer, as a forward hook of its operator."""
        if self.tape.active:
            self.look(inputs[0] if isinstance(module, SoftmaxAttention) else None, out, None)


@dataclass
class TaughtLayer:
    """The operator of a layer with losses: softmax attention, or a copy of the teacher's, and its observers."""

    copy: Copy | None = None
    observers: list[Observer] = field(default_factory=list)

    @property
    def tape(self) -> Tape:
        """Any tape of the layer: all are in the same step."""
        return self.observers[0].tape if self.copy is None else self.copy.tape

    @property
    def needs(self) -> Collection[str]:
        return self.taught_needs if self.tape.active else QKV

    @property
    def taught_needs(self) -> Collection[str]:
        """Projections of the student that a step uses."""
        return QKV if self.copy is None else self.copy.taught_needs

    def __call__(self, heads: Heads) -> Tensor:
        if not self.tape.active:
            return softmax(heads)
        out, lse = self._attend(heads)
        for observer in self.observers:
            observer.look(heads, out, lse)
        return out

    def _attend(self, heads: Heads) -> tuple[Tensor, Tensor | None]:
        if self.copy is not None:
            return self.copy.taught(heads), None
        if any(observer.needs_lse for observer in self.observers):
            if heads.windows is not None:
                return window_attention(heads)
            return attention_with_lse(*heads.qkv(), heads.scale, heads.bias)
        return softmax(heads), None


def attach(host: AttentionHost, part: Copy | Observer, method: str, changes: Changes) -> None:
    """Add a copy or a loss to an attention layer of the student.

    Raises TransferError: the layer has no softmax attention of its own that `method` could use.
    """
    layer = part.link.pair.student
    if isinstance(part, Observer):
        changes.observers.append(part)
    if isinstance(host, ConvertedAttention):
        softmax_of_all = isinstance(host.operator, SoftmaxAttention)
        if isinstance(part, Copy) or (part.reads_projections and not softmax_of_all):
            align = "mode=align" if host.operator.traits.linear_in_v else "mode=align with align.match=output"
            raise TransferError(
                f"layer {layer} of the student has {host.choice} in place of softmax attention: use {align}, or "
                "transfer.method attention_output, block_output, feature or logits"
            )
        changes.hooks.append(host.operator.register_forward_hook(part.watch))
        return
    taught = host.operator if isinstance(host.operator, TaughtLayer) else TaughtLayer()
    if isinstance(part, Copy):
        copies, reads = [*filter(None, [taught.copy]), part], taught.observers
        taught.copy = part
    else:
        copies, reads = [*filter(None, [taught.copy])], [*taught.observers, part]
        taught.observers = reads
    if len(copies) > 1:
        raise TransferError(
            f"transfer.losses copies into layer {layer} of the student twice: give the copies different layers"
        )
    if copies and any(observer.reads_projections for observer in reads):
        raise TransferError(
            f"transfer.losses copies into layer {layer} of the student, which then has no attention of its own for "
            f"transfer.method={method}: give the two different layers"
        )
    host.operator = taught


def freeze_unused(student: nn.Module, hosts: Collection[AttentionHost], changes: Changes) -> None:
    """Freeze what copied layers never use, so that DDP does not wait for its gradient."""
    for host in hosts:
        if isinstance(host.operator, TaughtLayer):
            changes.frozen += _freeze_host(host, host.operator.taught_needs)
    if not any({"q", "k"} & set(_needs(host)) for host in hosts):
        for name in ("rel_pos_bias", "shared_rel_pos"):
            changes.frozen += _freeze(student._modules.get(name))


def _needs(host: AttentionHost) -> Collection[str]:
    operator: Any = host.operator
    return operator.taught_needs if isinstance(operator, TaughtLayer) else operator.needs


def _freeze_host(host: AttentionHost, needs: Collection[str]) -> list[nn.Parameter]:
    frozen: list[nn.Parameter] = []
    for part in QKV:
        if part not in needs:
            for name in (f"{part}_proj", f"{part}_norm", part):
                frozen += _freeze(host._modules.get(name))
    if "q" not in needs:
        frozen += _freeze_parameters([host._parameters.get("logit_scale")])
    if "q" not in needs and "k" not in needs:
        frozen += _freeze_parameters([host._parameters.get(name) for name in BIAS])
        for name in BIAS:
            frozen += _freeze(host._modules.get(name))
    return frozen


def _freeze(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else _freeze_parameters(list(module.parameters()))


def _freeze_parameters(parameters: list[nn.Parameter | None]) -> list[nn.Parameter]:
    """Freeze the parameters that learn, and return them."""
    frozen = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen
