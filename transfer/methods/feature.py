"""Features after the last block, pulled to the teacher's: the pooled one before the head, the patches', or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.copying.teacher_view import Wanted
from ...models.errors import ConfigError, Json, TransferError
from ..config import LossConfig
from .feature_parts import PARTS, FeaturePart, image_size_of, record_images
from .method import Installed, Pairing, TransferMethod
from .standardize import Measured, Standardizer
from .transfer_plan import TransferPlan

RESULTS = {"feature": "pooled", "patches": "patches"}
"""By the name of each loss, the result of the whole teacher that it reads."""
STANDARDIZED = {
    "dimension": ", each dimension of the teacher's standardized",
    "phi_s": ", the teacher's standardized by PHI-S",
}


class Feature(TransferMethod):
    """The distance of what goes into the head, of the patches, or the sum of both."""

    name = "feature"
    words = "{feature_loss} between "
    uses_layers = False
    nears_features = True
    reads = frozenset({"feature_loss", "tokens", "standardize", "standardize_images", "weight"})

    def wanted(self, plan: TransferPlan) -> Wanted:
        return Wanted(whole=frozenset(RESULTS[part.loss_name] for part in PARTS[plan.tokens]))

    def keeps_vectors(self, settings: LossConfig) -> bool:
        return settings.tokens == "pooled"

    def loss_names(self, settings: LossConfig) -> tuple[str, ...]:
        return tuple(part.loss_name for part in PARTS[settings.tokens])

    def describe(self, settings: Json) -> str:
        parts = PARTS.get(str(settings.get("tokens")), PARTS["pooled"])
        how = STANDARDIZED.get(str(settings.get("standardize")), "")
        return super().describe(settings) + " and ".join(part.words for part in parts) + how

    def check_read(self, settings: LossConfig, where: str) -> None:
        super().check_read(settings, where)
        number = settings.standardize_images
        if settings.standardize == "none" and number != LossConfig.model_fields["standardize_images"].default:
            raise ConfigError(
                f"{where}.standardize_images={number} changes nothing with standardize=none: leave it out, or set "
                "standardize to dimension or phi_s"
            )

    def install(self, pairing: Pairing) -> Installed:
        config, installed, losses = pairing.config, Installed(), []
        record_images(pairing.student, pairing.tape, pairing.changes)
        for kind in PARTS[config.tokens]:
            part = kind(pairing.student, pairing.teacher, pairing.tape)
            part.record(pairing.changes)
            student, teacher = part.widths
            if teacher == 0:
                raise TransferError(f"the teacher does not give {part.words}: use other tokens, or logits")
            standardizer = None
            if config.standardize != "none":
                standardizer = Standardizer(config.standardize, teacher)
                installed.projectors[f"{part.loss_name}_statistics"] = standardizer
                installed.measured.append(Measured(standardizer, config.standardize_images, part.of_teacher))
            if student != teacher or standardizer is not None:
                installed.projectors[part.loss_name] = nn.Linear(student, teacher)
            losses.append(_FeatureLoss(part, config.feature_loss, installed.projectors))
        installed.finish = _Losses(losses)
        return installed


@dataclass(eq=False)
class _FeatureLoss:
    part: FeaturePart
    loss: str
    projectors: nn.ModuleDict

    def __call__(self) -> Tensor:
        student, name = self.part.of_student(), self.part.loss_name
        if name in self.projectors:
            student = self.projectors[name](student)
        student, teacher = precise(student), self.part.of_teacher(image_size_of(self.part.tape))
        if f"{name}_statistics" in self.projectors:
            teacher = self.projectors[f"{name}_statistics"](teacher)
        if self.loss == "smooth_l1":
            return F.smooth_l1_loss(student, teacher)
        if self.loss == "mse":
            return F.mse_loss(student, teacher)
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


@dataclass(eq=False)
class _Losses:
    losses: Sequence[_FeatureLoss]

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        return {loss.part.loss_name: loss() for loss in self.losses}


METHODS = (Feature(),)
