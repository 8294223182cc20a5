"""Class probabilities pulled to the teacher's: distillation as it began (arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.tape import KeepOutput, Tape
from ...models.copying.teacher_view import Wanted
from ...models.errors import TransferError
from .method import Installed, Pairing, TransferMethod, TransferPlan


class Logits(TransferMethod):
    """KL divergence of the student's class probabilities from the teacher's, or cross-entropy with its class."""

    name = "logits"
    words = "{logits_loss} between the class probabilities"
    uses_layers = False
    teaches_classes = True

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(whole=frozenset({"classes"}))

    def install(self, pairing: Pairing) -> Installed:
        config, student = pairing.config, pairing.student
        if config.logits_loss == "hard" and config.temperature != 1:
            raise TransferError(
                f"transfer.temperature={config.temperature:g} changes nothing with transfer.logits_loss=hard: leave it "
                "out"
            )
        heads: dict[str, nn.Module] = {}
        if config.logits_head == "distillation":
            heads = {name: module for name in HEADS if (module := student._modules.get(name)) is not None}
            if len(heads) < len(HEADS):
                raise TransferError(
                    "transfer.logits_head=distillation needs a student with a head for a distillation token, such as "
                    "deit_base_distilled_patch16_224; use all"
                )
        for name, head in heads.items():
            pairing.changes.hooks.append(
                head.register_forward_hook(KeepOutput(pairing.tape, f"logits of {name}"))
            )
        hard, temperature = config.logits_loss == "hard", config.temperature
        loss = _LogitsLoss(pairing.tape, temperature, hard, own_head=bool(heads))
        return Installed(finish=loss, labelled=loss.labelled if heads else None)


HEADS = ("head", "head_dist")
"""The heads of a student with a distillation token: for labels, and for the teacher's classes."""


@dataclass(eq=False)
class _LogitsLoss:
    tape: Tape
    temperature: float
    hard: bool
    own_head: bool

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        mine = precise(self.of_head("head_dist") if self.own_head else logits)
        theirs = precise(self.tape.whole["classes"])
        if self.hard:
            return {"logits": F.cross_entropy(mine, theirs.argmax(-1))}
        target = F.log_softmax(theirs / self.temperature, dim=-1)
        mine = F.log_softmax(mine / self.temperature, dim=-1)
        loss = F.kl_div(mine, target, reduction="batchmean", log_target=True)
        return {"logits": loss * self.temperature**2}

    def of_head(self, name: str) -> Tensor:
        return self.tape.features[f"logits of {name}"]

    def labelled(self) -> Tensor:
        """Return the logits that learn from labels."""
        return self.of_head("head")


METHODS = (Logits(),)
