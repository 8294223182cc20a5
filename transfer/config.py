"""What a run is: typed sections that the engine reads. No torch here, so that `graftvit --help` stays quick.

Every key is also a flag of the command line (`optim.blr` is `--optim.blr`, or `--blr` where the last name is
unique), and every default below is the default of the flag.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..checkpoints.files import NOT_A_URL, is_url
from ..models.errors import JsonDict
from .methods.registry import method_names

# The base class of settings sections, and checks for all settings, without torch.

T = TypeVar("T")


@dataclass(frozen=True)
class OneOf:
    """Marks a setting whose valid values are names in a registry, which other packages can extend."""

    names: Callable[[], Iterable[str]]


MAX_WHOLE = 2**63
"""Whole numbers stay below what torch and the file formats hold."""


def check_plain(value: Any, depth: int = 50) -> None:
    """Raise ValueError for non-finite numbers, text with a NUL, and too deep nesting."""
    if depth == 0:
        raise ValueError("it nests too many levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise ValueError("whole numbers must be below 2^63")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise ValueError("text and paths must not contain a NUL character")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for part in value:
            check_plain(part, depth - 1)


class Section(BaseModel):
    """A group of settings; an unknown key or a value of the wrong kind is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (
            isinstance(kind, type) and issubclass(kind, Section)
        ):  # its own fields are checked separately
            check_plain(value)
        return value

    @field_validator("*")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        for table in cls.model_fields[str(info.field_name)].metadata:
            if isinstance(table, OneOf) and value not in table.names():
                valid = ", ".join(map(repr, table.names()))
                raise PydanticCustomError("one_of", "Input should be one of {valid}", {"valid": valid})
        return value


def check_local(path: T) -> T:
    """Raise ValueError for a URL where a path on this machine is meant."""
    if isinstance(path, str | Path) and is_url(path):
        raise ValueError(NOT_A_URL)
    return path


LOCAL = AfterValidator(check_local)
"""Marks a setting that is a path on this machine."""


def check_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """Raise ValueError for an image size without pixels."""
    if size is not None and min((size,) if isinstance(size, int) else size) <= 0:
        raise ValueError("an image size is a whole number above 0, or two: height, width")
    return size


def check_size_text(size: Any) -> Any:
    """Raise ValueError for an image size such as 72x104, and say how it is written."""
    found = re.fullmatch(r"(\d+) *[x×,] *(\d+)", size) if isinstance(size, str) else None
    if found is not None:
        raise ValueError(f"write height and width as [{found[1]}, {found[2]}]")
    return size


def check_arguments(arguments: JsonDict) -> JsonDict:
    """Raise ValueError for a value that is no JSON, and for a name such as `depth:6`, which YAML reads as a name."""
    for name, value in arguments.items():
        if not name.isidentifier():
            raise ValueError(
                f"{name!r} is not the name of an argument; write '{{depth: 6}}', with a space after the colon"
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name}={value!r} cannot be written to config.yaml: give its name as text"
            ) from error
    return arguments


# The settings of the losses of a run. No torch here, so that `graftvit --help` stays quick.


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


Mode = Literal["transfer", "align", "finetune", "scratch", "pretrain"]
Metric = Literal["auto", "top1", "loss", "knn", "probe", "distance"]
AUTO: Final = "auto"
"""Of the student's model and pooling: as the weights have it that the student starts from."""


class TeacherConfig(Section):
    """The frozen model that is copied or distilled."""

    source: str | None = Field(
        None, description="timm name, hf-hub:org/name[@revision], local-dir:path, .safetensors or .pth"
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit on the hub; the loaded commit is written to the run's config.yaml, "
        "and a resumed run loads that commit",
    )
    model: str | None = Field(
        None, description="timm architecture, for a weights file that does not name its own"
    )
    model_args: JsonDict = Field({}, description="keyword arguments of the teacher's timm constructor")
    img_size: int | tuple[int, int] | None = Field(
        None,
        description="image size of the teacher's input, to which it is resampled; the student's by default",
    )
    position_embedding: Literal["timm", "mae"] = Field(
        "timm",
        description="method to resample position embeddings: timm's antialiased bicubic, or MAE's plain "
        "bicubic",
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="type of the teacher's weights: half of the memory with bf16 or fp16"
    )
    compile: bool = Field(False, description="compile the teacher's forward pass with torch.compile")
    shard: bool = Field(
        False,
        description="shard the teacher's weights over the processes with FSDP2, for one larger than a device",
    )

    _check_size = field_validator("img_size")(check_size)
    _check_size_text = field_validator("img_size", mode="before")(check_size_text)
    _check_arguments = field_validator("model_args")(check_arguments)

    def image_size(self, student: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        """Return the size of the teacher's images: the given size, else the student's, if that is given."""
        size: int | tuple[int, int] | None = self.img_size or self.model_args.get("img_size") or student
        return size


class StudentConfig(Section):
    """The model that learns. It is a timm model; a plan, or a method that copies, changes its attention."""

    model: str = Field(
        AUTO,
        description="timm architecture of a fresh student, or the source of an existing one (local-dir:…, "
        "hf-hub:…, a file); auto: that of the weights it starts from, else vit_base_patch16_224",
    )
    model_args: JsonDict = Field(
        {},
        description="keyword arguments of the student's timm constructor, beside those of the weights it starts from",
    )
    plan: str | None = Field(
        None,
        description="operator of each layer, such as '*: linear; 9-11: softmax'; the architecture's own by "
        "default",
    )
    calibrate: int = Field(
        0,
        ge=0,
        description="training images on which the operators of the plan are fitted and calibrated before the first "
        "step; hash needs it",
    )
    without: tuple[Literal["bias"], ...] = Field(
        (),
        description="parts of a pyramid's layers that a plan gives up where an operator does not take them: bias, the "
        "relative position bias (Swin)",
    )
    init: str | None = Field(
        None,
        description="initial weights: any teacher source, or 'teacher' for the teacher's weights; by "
        "default the teacher's in the modes align and finetune, else fresh",
    )
    img_size: int | tuple[int, int] | None = Field(
        None,
        description="input resolution; by default that of the weights it starts from, else the architecture's",
    )
    global_pool: Literal["auto", "avg", "token", "map", ""] | None = Field(
        AUTO,
        description="pooling before the head; auto: that of the weights it starts from, else avg; none: the "
        "architecture's",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate of the last block")
    pos_embed_std: float | None = Field(
        None,
        gt=0,
        description="deviation of the fresh position embeddings; the architecture's own by default",
    )
    mirror_teacher: bool = Field(
        False,
        description="give the student the teacher's native parts (LayerScale, registers, ...), freshly initialized",
    )
    grad_checkpointing: bool = Field(False, description="recompute block activations in the backward pass")
    compile: bool = Field(False, description="compile the step's forward with torch.compile(fullgraph=True)")

    _check_size = field_validator("img_size")(check_size)
    _check_size_text = field_validator("img_size", mode="before")(check_size_text)
    _check_arguments = field_validator("model_args")(check_arguments)


class AlignConfig(Section):
    """How converted layers learn on their teacher's inputs (mode align)."""

    match: Literal["output", "map", "probes", "rows"] = Field(
        "output",
        description="loss between a layer and the teacher's: output error, exact map error, its estimate by "
        "random probes, or cross-entropy of sampled rows",
    )


class DataConfig(Section):
    """What is read and how it is augmented."""

    dataset: str = Field(
        "", description="timm data set name (folder by default): torch/cifar10, hfds/..., wds/..., or digits"
    )
    data_path: str | None = Field(None, description="root folder of the data set")
    stage: Annotated[str | None, LOCAL] = Field(
        None,
        description="folder on a node's local disk to which each node copies the data set once; in "
        "'$SLURM_TMPDIR' each node uses its own value",
    )
    train_split: str = Field("train", description="split to train on")
    val_split: str | None = Field("validation", description="split to evaluate on; none turns evaluation off")
    download: bool = Field(False, description="let torchvision download the data set")
    image_column: str | None = Field(
        None,
        description="column of the images in hfds and hfids, feature in tfds, file ending in wds; guessed by default",
    )
    label_column: str | None = Field(
        None,
        description="column of the labels in hfds and hfids, feature in tfds, field of the .json in wds; "
        "guessed by default",
    )
    classes: str | list[str] | None = Field(
        None,
        description="classes of a larger set to keep: names joined by commas, imagenet-100, or a text file "
        "with one name per line",
    )
    num_classes: int | None = Field(None, description="number of classes; read from the data set by default")
    train_samples: int | None = Field(
        None, gt=0, description="use only this many training samples, balanced over classes"
    )
    label_seed: int = Field(0, description="seed that chooses the train_samples")
    batch_size: int = Field(32, gt=0, description="images per device and step")
    eval_batch_size: int | None = Field(
        None, gt=0, description="images per device in evaluation; batch_size by default"
    )
    workers: int = Field(4, ge=0, description="loader processes per device")
    views: int | None = Field(
        None,
        ge=0,
        description="number of augmented views of each image: epoch e shows view e modulo this number; 0 shows "
        "images without augmentation, as evaluation does; a new view each epoch by default",
    )
    aug_repeats: int = Field(
        1,
        gt=0,
        description="repeated augmentation: an epoch shows one image in this many, each this many times with other "
        "augmentation; 3 in DeiT, PVT and LIT-Ti",
    )
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="area range of the random resized crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    aa: str | None = Field(
        "rand-m9-mstd0.5-inc1", description="timm auto-augment policy, 'affine' for digits, or none"
    )
    color_jitter: float = Field(0.0, ge=0, description="strength of color jitter with aa=none")
    interpolation: Literal["bicubic", "bilinear", "random"] | None = Field(
        None,
        description="interpolation of resizing; the weights' own by default, and in evaluation also with "
        "random",
    )
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="share of a side that evaluation keeps; the weights' own by default"
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        None, description="timm's crop mode in evaluation; the weights' own by default"
    )
    reprob: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    mixup: float = Field(0.0, ge=0, description="mixup alpha")
    cutmix: float = Field(0.0, ge=0, description="cutmix alpha")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    max_bad_images: float = Field(
        0.01,
        ge=0,
        description="share of a split's images (below 1), or their number (from 1 on), that may be unreadable; a run "
        "with more, or with a class that lost most of its images, stops",
    )

    @field_validator("data_path")
    @classmethod
    def _check_data_path(cls, path: str | None, info: ValidationInfo) -> str | None:
        """Refuse a URL, except of the streams that are read from one."""
        streams = info.data.get("dataset", "").lower().startswith(("wds/", "tfds/"))
        return path if streams else check_local(path)

    @field_validator("max_bad_images")
    @classmethod
    def _check_bad(cls, limit: float) -> float:
        if limit >= 1 and not limit.is_integer():
            raise ValueError("give a share below 1, or a whole number of images")
        return limit

    @field_validator("stage")
    @classmethod
    def _check_stage(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.strip():
            raise ValueError(
                "a folder has a name; quote a variable, as in '$SLURM_TMPDIR': the shell put nothing in"
            )
        return folder

    @field_validator("crop_scale")
    @classmethod
    def _check_crop_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                "the least and the largest share of the area are above 0, at most 1, in this order"
            )
        return scale


class OptimConfig(Section):
    """Optimizer, schedule and length."""

    epochs: int = Field(100, gt=0, description="passes over the training set")
    max_steps: int | None = Field(None, gt=0, description="stop after this many steps; overrides epochs")
    opt: str = Field("adamw", description="timm optimizer name")
    lr: float | None = Field(
        None, gt=0, description="absolute learning rate; blr x effective batch / 256 by default"
    )
    blr: float = Field(1e-3, gt=0, description="base learning rate for 256 images")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_epochs: float = Field(5, ge=0, description="linear warm-up from zero")
    weight_decay: float = Field(0.05, ge=0, description="weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="betas of Adam")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate factor from each layer to the one below it"
    )
    clip_grad: float | None = Field(None, gt=0, description="largest gradient norm")
    accum_iter: int = Field(1, gt=0, description="batches accumulated before an optimizer step")
    recipe_batch: int | None = Field(
        None,
        gt=0,
        description="images per step of the published recipe; the plan and the log say by how much a run differs",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the student's moving average; off by default"
    )
    scales: dict[str, PositiveFloat] = Field(
        {},
        description="learning rate factors of parameters, by a regular expression of their names; where several match, "
        "they multiply",
    )
    lora: int | None = Field(
        None,
        gt=0,
        description="rank of LoRA adapters that learn instead of the attention weights; needs peft",
    )
    trainable: str = Field(
        ".*", description="regular expression of the parameters that learn; the head always learns"
    )


class EngineConfig(Section):
    """Where and how the loop runs."""

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision of autocast")
    tf32: bool = Field(
        False,
        description="let a GPU round the inputs of float32 matrix products to TF32; off is exact float32",
    )
    fsdp: bool = Field(False, description="shard the student with FSDP2 instead of replicating it")
    device: Literal["auto", "cpu"] = Field("auto", description="cpu uses no GPU")
    log_interval: int = Field(
        20, gt=0, description="optimizer steps between log records; the only device synchronization"
    )
    eval_every: int = Field(1, gt=0, description="epochs between evaluations")
    metric: Metric = Field(
        "auto",
        description="metric that chooses the best state; auto is top1 if labels and head match, else the "
        "distance to the teacher or the run's own loss, on the test images",
    )
    patience: int | None = Field(
        None, gt=0, description="end the run after this many evaluations without a better value of the metric"
    )
    save_every: int | None = Field(
        None, gt=0, description="optimizer steps between states; each epoch by default"
    )
    save_minutes: float | None = Field(
        None,
        gt=0,
        description="also save a state at the next step after this many minutes without one",
    )
    keep_states: int = Field(
        0,
        ge=0,
        description="number of newest states to keep under their step, besides last, previous and best",
    )
    stop_grace: float = Field(
        300.0,
        gt=0,
        description="after a stop signal, end without a save if no step and no evaluation batch ends within "
        "this many seconds",
    )
    evaluate_start: bool = Field(
        False,
        description="also evaluate the student before its first step: the accuracy after conversion alone",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues the run in output_dir if it holds one"
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",), description="trackers that record curves"
    )
    evaluate_teacher: bool = Field(
        True, description="report the teacher's accuracy at the start if it has a head"
    )
    progress: bool = Field(True, description="draw a progress bar on a terminal")


class PretrainConfig(Section):
    """Masked autoencoding (MAE, arXiv:2111.06377): how the teacher of a new domain is made."""

    mask_ratio: float = Field(0.75, gt=0, lt=1, description="fraction of patches hidden")
    decoder_dim: int = Field(512, gt=0, description="decoder dim")
    decoder_depth: int = Field(8, gt=0, description="decoder depth")
    decoder_heads: int = Field(16, gt=0, description="decoder heads")
    norm_pixels: bool = Field(True, description="normalize each target patch")
    decay_tokens: bool = Field(
        True,
        description="apply weight decay to tokens and position embeddings, as MAE's code does; off exempts them as in "
        "the other modes",
    )


class RunConfig(Section):
    """Everything a run needs; written to the run folder as config.yaml."""

    mode: Mode = Field("transfer", description="what the run trains, and from what")
    output_dir: Annotated[Path, LOCAL] = Field(Path("runs/default"), description="the run folder")
    seed: int = Field(0, ge=0, description="seed")
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, TeacherConfig] = Field(
        {},
        description="further teachers by name for transfer.losses, as in '{convnext: {source: convnext_base}}'",
    )
    student: StudentConfig = StudentConfig()
    transfer: TransferConfig = TransferConfig()
    align: AlignConfig = AlignConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    pretrain: PretrainConfig = PretrainConfig()
