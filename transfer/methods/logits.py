"""Class probabilities pulled to the teacher's: distillation as it began (arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...models.attention.kernels import precise
from ...models.copying.tape import Tape
from ...models.copying.teacher_view import Wanted
from ...models.errors import TransferError
from ...models.families import vit
from .method import Installed, Pairing, TransferMethod
from .transfer_plan import TransferPlan


class Logits(TransferMethod):
    """KL divergence of the student's class probabilities from the teacher's."""

    name = "logits"
    words = "KL divergence between the class probabilities"
    uses_layers = False
    teaches_classes = True
    temperature = True

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(whole=frozenset({"classes"}))

    def install(self, pairing: Pairing) -> Installed:
        teacher = pairing.teacher
        classes = [vit(model).num_classes for model in (teacher, pairing.student)]
        if classes[0] != classes[1] or classes[0] == 0:
            raise TransferError(
                f"transfer.method=logits needs one set of classes, and the teacher has {classes[0]} and the student "
                f"{classes[1]}; use a teacher fine-tuned on this data, or method=feature"
            )
        return Installed(finish=_LogitsLoss(pairing.tape, pairing.config.temperature))


@dataclass(eq=False)
class _LogitsLoss:
    tape: Tape
    temperature: float

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        target = F.log_softmax(precise(self.tape.whole["classes"]) / self.temperature, dim=-1)
        mine = F.log_softmax(precise(logits) / self.temperature, dim=-1)
        loss = F.kl_div(mine, target, reduction="batchmean", log_target=True)
        return {"logits": loss * self.temperature**2}


METHODS = (Logits(),)
