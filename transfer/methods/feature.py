"""The pooled feature before the head, pulled to the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.any_timm import feature_width
from ...models.attention.kernels import precise
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import Wanted
from ...models.errors import TransferError
from .method import Installed, Pairing, TransferMethod
from .transfer_plan import TransferPlan

HEADS = ("head", "head_dist")


class Feature(TransferMethod):
    """The distance of what goes into the head; DeiT's two heads read two tokens, and their mean is the feature."""

    name = "feature"
    words = "{feature_loss} between the pooled features before the head"
    uses_layers = False
    nears_features = True
    reads = frozenset({"feature_loss", "weight"})

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(whole=frozenset({"pooled"}))

    def install(self, pairing: Pairing) -> Installed:
        student, tape, installed = pairing.student, pairing.tape, Installed()
        for name in HEADS:
            head = student._modules.get(name)
            if head is not None:
                pairing.changes.hooks.append(head.register_forward_pre_hook(_KeepInput(tape, name)))
        widths = feature_width(student), feature_width(pairing.teacher)
        if widths[0] != widths[1]:
            installed.projectors["feature"] = nn.Linear(*widths)
        installed.finish = _FeatureLoss(tape, pairing.config.feature_loss, installed.projectors)
        return installed


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
        if not any(name in self.tape.features for name in HEADS):
            raise TransferError(
                "the student's head was not seen to run: it was compiled before it was taught, or replaced; wrap the "
                "plain model, and compile the DualViT"
            )
        inputs = [self.tape.features[name] for name in HEADS if name in self.tape.features]
        student, teacher = torch.stack(inputs).mean(0), self.tape.whole["pooled"]
        if "feature" in self.projectors:
            student = self.projectors["feature"](student)
        student, teacher = precise(student), precise(teacher)
        if self.loss == "smooth_l1":
            return {"feature": F.smooth_l1_loss(student, teacher)}
        return {"feature": 1 - F.cosine_similarity(student, teacher, dim=-1).mean()}


METHODS = (Feature(),)
