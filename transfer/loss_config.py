"""The settings of the losses of a run. No torch here, so that `graftvit --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .methods.registry import method_names
from .section import LOCAL, OneOf, Section


class LossConfig(Section):
    """One loss or one copy: what to take from a teacher, from where, and its weight."""

    method: Annotated[str, OneOf(method_names)] = Field(
        "distill", description="what is copied, distilled or matched"
    )
    layers: str | list[int] | list[tuple[int, int]] = Field(
        "all",
        description="all, first:N, last:N, every:N, A:B (half open, negative from the end), 0,3,5, stages of a pyramid "
        "stage2,stage3 or stage3.0-1, or teacher>student pairs 2>0,5>1 or stage2>stage3",
    )
    heads: str | list[int] = Field(
        "all",
        description="all, a list such as 0,1,4, 'mean' (groups) or 'match' (assignment) when head counts differ",
    )
    loss: Literal["ce", "kl"] = Field(
        "ce", description="loss between maps; equal gradients, kl also subtracts the entropy"
    )
    feature_loss: Literal["cosine", "smooth_l1", "mse"] = Field(
        "cosine", description="loss of method=feature"
    )
    tokens: Literal["pooled", "patches", "both"] = Field(
        "pooled",
        description="features of method=feature: the pooled one before the head, those of the patches after the "
        "final norm, or both",
    )
    standardize: Literal["none", "dimension", "phi_s"] = Field(
        "none",
        description="standardize the teacher's features with method=feature: each dimension by itself, or all by one "
        "scale after a rotation (PHI-S)",
    )
    standardize_images: int = Field(
        1024, gt=0, description="training images that the statistics of standardize are measured on"
    )
    logits_loss: Literal["kl", "hard"] = Field(
        "kl", description="loss of method=logits: KL divergence, or cross-entropy with the teacher's class"
    )
    logits_head: Literal["all", "distillation"] = Field(
        "all",
        description="which head learns with method=logits: the prediction of all heads, or only that of "
        "DeiT's distillation token, while only the other head learns from labels",
    )
    weight: float = Field(3.0, ge=0, description="weight of the transfer loss; 3 as published")
    reduction: Literal["sum", "mean"] = Field(
        "sum",
        description="over layers: sum as published, or mean (multiply the weight by the number of layers to match)",
    )
    temperature: float = Field(
        1.0, gt=0, description="divides teacher and student logits; the loss is multiplied by T^2"
    )
    rows: float = Field(
        1.0, gt=0, le=1, description="fraction of query rows that the map loss samples each step, unbiased"
    )
    interpolate_grid: bool = Field(
        False,
        description="distill maps between different patch grids by interpolating the teacher's attention logits",
    )

    @field_validator("layers", "heads", mode="before")
    @classmethod
    def _one_number(cls, chosen: Any) -> Any:
        """Read a single number, as YAML reads `layers: 7`, as the text of it."""
        return str(chosen) if isinstance(chosen, int) and not isinstance(chosen, bool) else chosen


class LossEntry(LossConfig):
    """An entry of `transfer.losses`."""

    teacher: str | None = Field(
        None, description="name of the teacher in `teachers`; the section `teacher` by default"
    )


class TransferConfig(LossConfig):
    """The losses of a run: what to take from which teacher and layers, and with which weight."""

    losses: list[LossEntry] = Field(
        [],
        description="several losses in one run, as in '[{method: distill, weight: 3}, {method: feature}]'; "
        "each entry takes the settings above, which describe a single loss, and a teacher",
    )
    task_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the classification loss; 0 learns only from the teacher, without labels",
    )
    share_drop_path: bool = Field(
        False,
        description="apply the student's stochastic-depth masks to the teacher too, as the official code does",
    )
    cache: Annotated[str | None, LOCAL] = Field(
        None,
        description="folder that keeps what the teachers compute of the training images, so that they compute it "
        "once for all epochs and runs; needs data.views",
    )
    cache_limit: float | None = Field(
        None,
        gt=0,
        description="largest size in GiB of this run's targets in transfer.cache; by default what is missing may "
        "take 90% of the free disk",
    )

    @property
    def terms(self) -> tuple[LossEntry, ...]:
        """Return `losses`, or the single loss that the other settings describe."""
        short = LossEntry(**{name: getattr(self, name) for name in LossConfig.model_fields})
        return tuple(self.losses) or (short,)

    @model_validator(mode="after")
    def _check_form(self) -> TransferConfig:
        short = [
            name for name, field in LossConfig.model_fields.items() if getattr(self, name) != field.default
        ]
        if self.losses and short:
            raise ValueError(describes_single_loss(f"transfer.{short[0]}", short[0]))
        return self


def describes_single_loss(given: str, name: str) -> str:
    """Return why the setting `name`, which the user wrote as `given`, is refused beside `transfer.losses`."""
    return (
        f"{given} describes a single loss and cannot be used with transfer.losses: write {name} into an entry of "
        "transfer.losses"
    )
