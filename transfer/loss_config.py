"""The settings of the losses of a run: the section `transfer` and its entries. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from pydantic import field_validator, model_validator

from ..models.errors import JsonDict
from .methods.method_facts import facts_of, method_names, reads_setting
from .setting import Need, OneOf, Section, in_mode, rule_of, setting

READS = "with transfer.method={run.method}: leave it out (it reads {run.reads})"
STANDARDIZES = Need(
    lambda loss: loss.standardize != "none",
    "with standardize=none: leave it out, or set standardize to dimension or phi_s",
    of="section",
)
CACHED = Need(
    lambda run: run.transfer.cache is not None, "without transfer.cache: leave it out, or set transfer.cache"
)

CacheType = Literal["exact", "bf16", "int8"]
"""The types of `transfer.cache_type`: `TargetForm` packs them, `python -m benchmarks.targets` measures each."""


def _or_number(schema: JsonDict) -> None:
    """Add the single number that `LossConfig` reads as text."""
    schema["anyOf"].append({"type": "integer"})


class LossConfig(Section):
    """One loss or one copy: what to take from a teacher, from where, and its weight."""

    method: Annotated[str, OneOf(method_names)] = setting(
        "distill", "what is copied, distilled or matched", see="[methods](transfer.md)"
    )
    layers: str | list[int] | list[tuple[int, int]] = setting(
        "all",
        "all, first:N, last:N, every:N, A:B (half open, negative from the end), 0,3-5, stages of a pyramid "
        "stage2,stage3 or stage3.0-1, or teacher>student pairs 2>0,5>1 or stage2>stage3",
        json_schema_extra=_or_number,
    )
    heads: str | list[int] = setting(
        "all",
        "all, a list such as 0,1,4, 'mean' (groups) or 'match' (assignment) when head counts differ",
        json_schema_extra=_or_number,
    )
    loss: Literal["ce", "kl"] = setting(
        "ce", "loss between maps; equal gradients, kl also subtracts the entropy"
    )
    feature_loss: Literal["cosine", "smooth_l1", "mse"] = setting("cosine", "loss of method=feature")
    tokens: Literal["pooled", "patches", "both"] = setting(
        "pooled",
        "features of method=feature: the pooled one before the head, those of the patches after the final norm, or "
        "both",
    )
    standardize: Literal["none", "dimension", "phi_s"] = setting(
        "none",
        "standardization of the teacher's features with method=feature: each dimension by itself, or all by one scale "
        "after a rotation (PHI-S)",
    )
    standardize_images: int = setting(
        1024, "training images that the statistics of standardize are measured on", STANDARDIZES, gt=0
    )
    logits_loss: Literal["kl", "hard"] = setting(
        "kl", "loss of method=logits: KL divergence, or cross-entropy with the teacher's class"
    )
    logits_head: Literal["all", "distillation"] = setting(
        "all",
        "head that learns with method=logits: the prediction of all heads, or only that of DeiT's distillation token, "
        "while only the other head learns from labels",
    )
    weight: float = setting(3.0, "weight of the transfer loss; 3 as published", ge=0, also=("atd_weight",))
    reduction: Literal["sum", "mean"] = setting(
        "sum",
        "reduction over layers: sum as published, or mean (multiply the weight by the number of layers to match)",
    )
    temperature: float = setting(
        1.0, "divisor of teacher and student logits; the loss is multiplied by T^2", gt=0
    )
    rows: float = setting(
        1.0, "fraction of query rows that the map loss samples each step, unbiased", gt=0, le=1
    )
    interpolate_grid: bool = setting(
        False,
        "distillation of maps between different patch grids, with the teacher's attention logits interpolated",
    )

    @classmethod
    def needs_of(cls, name: str) -> tuple[Need, ...]:
        """Return the conditions of a setting; those of a single loss need a method that reads them."""
        if name not in LossConfig.model_fields:
            return super().needs_of(name)
        read = Need(lambda loss: reads_setting(loss.method, name), READS, of="section")
        return (*cls.needs, read, *rule_of(cls.model_fields[name]).needs)

    @property
    def reads(self) -> str:
        """The names of the settings that the method reads."""
        return ", ".join(sorted(facts_of(self.method).reads or ()))

    @field_validator("layers", "heads", mode="before")
    @classmethod
    def _one_number(cls, chosen: Any) -> Any:
        """Read a single number, as YAML reads `layers: 7`, as the text of it."""
        return str(chosen) if isinstance(chosen, int) and not isinstance(chosen, bool) else chosen


class LossEntry(LossConfig):
    """An entry of `transfer.losses`."""

    teacher: str | None = setting(None, "name of the teacher in `teachers`; the section `teacher` by default")


class TransferConfig(LossConfig):
    """The losses of a run: what to take from which teacher and layers, and with which weight."""

    needs: ClassVar = (in_mode("transfer"),)

    losses: list[LossEntry] = setting(
        [],
        "several losses in one run, as in '[{method: distill, weight: 3}, {method: feature}]'; each entry takes the "
        "settings above, which describe a single loss, and a teacher",
    )
    task_weight: float = setting(
        1.0, "weight of the classification loss; 0 learns only from the teacher, without labels", ge=0
    )
    share_drop_path: bool = setting(
        False,
        "the student's stochastic-depth masks applied to the teacher too, as the official code does",
        Need(
            lambda run: run.student.drop_path > 0,
            "with student.drop_path=0, which drops no block: leave it out, or set student.drop_path",
        ),
    )
    cache: str | None = setting(
        None,
        "folder, or bucket (s3://...), that keeps what the teachers compute of the training images, so that they "
        "compute it once for all epochs and runs; needs data.views",
        outside=True,
        see="[the cache](transfer.md#a-teacher-that-runs-once)",
    )
    cache_type: CacheType = setting(
        "exact",
        "numbers in transfer.cache: as the teacher gives them, bf16, or int8 with a scale for each vector, which is "
        "wrong by at most half of it",
        CACHED,
    )
    cache_top: int | None = setting(
        None,
        "largest logits of an image that transfer.cache keeps, beside the probability of all other classes together; "
        "by default every logit",
        CACHED,
        Need(
            lambda run: any(reads_setting(term.method, "logits_loss") for term in run.transfer.terms),
            "without a loss of logits: leave it out",
        ),
        gt=0,
    )
    cache_pool: int = setting(
        1,
        "side of the squares of patches of which transfer.cache keeps the mean; 1 keeps each patch",
        CACHED,
        Need(
            lambda run: any(term.tokens != "pooled" for term in run.transfer.terms),
            "without a loss of patches: leave it out, or set transfer.tokens",
        ),
        gt=0,
    )
    cache_limit: float | None = setting(
        None,
        "largest size in GiB of this run's targets in transfer.cache; by default what is missing may take 90% of the "
        "free disk",
        CACHED,
        gt=0,
        outside=True,
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


# The same settings as keywords of Python, for editors and type checkers; a test holds them equal to the fields above.

MethodName = Literal[
    "copy",
    "copy_q",
    "copy_k",
    "copy_v",
    "distill",
    "distill_q",
    "distill_k",
    "distill_v",
    "attention_output",
    "block_output",
    "feature",
    "logits",
]
"""The methods of GraftViT. A registered one of another package is named in a `LossEntry`, which takes any text."""


class LossSettings(TypedDict, total=False):
    """What both forms of `DualViT` take for one loss, as `LossConfig` describes it."""

    layers: str | int | Sequence[int] | Sequence[tuple[int, int]]
    heads: (
        Literal["all", "mean", "match"] | str | int | Sequence[int]
    )  # the words for editors, or pairs as text
    loss: Literal["ce", "kl"]
    feature_loss: Literal["cosine", "smooth_l1", "mse"]
    tokens: Literal["pooled", "patches", "both"]
    standardize: Literal["none", "dimension", "phi_s"]
    standardize_images: int
    logits_loss: Literal["kl", "hard"]
    logits_head: Literal["all", "distillation"]
    weight: float
    reduction: Literal["sum", "mean"]
    temperature: float
    rows: float
    interpolate_grid: bool


class EntrySettings(LossSettings, total=False):
    """An entry of `losses` as a dictionary."""

    method: MethodName
    teacher: str | None


class DualSettings(LossSettings, total=False):
    """The keywords of `DualViT` beside its method: those of `TransferConfig` that its numbers depend on."""

    losses: Sequence[EntrySettings | LossEntry]
    task_weight: float
    share_drop_path: bool
