"""What a run is: typed sections that the engine reads. No torch here, so that `graftvit --help` stays quick.

Every key is also a flag of the command line (`optim.blr` is `--optim.blr`, or `--blr` where the last name is
unique), and every default below is the default of the flag. `setting` (`setting.py`) says the rest: when a setting has
an effect, what may change when a run resumes, and so on. The section `transfer` is in `loss_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    ModelWrapValidatorHandler,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..checkpoints.sources import split_part
from ..models.errors import JsonDict
from ..models.plugins import import_packages
from .loss_config import TransferConfig
from .methods.method_facts import facts_of
from .mode_config import (
    AUGMENTED,
    BYTES,
    CLASSIFIES,
    CROPPED,
    EVALUATES,
    FRESH_VIEWS,
    IN_A_FOLDER,
    JITTERED,
    LABELED,
    LARGEST_BATCH,
    MODE_FACTS,
    NO_VIEWS,
    RESIZED_AT_RANDOM,
    SUBSET,
    TEACHER,
    VIEWED,
    AlignConfig,
    DenseConfig,
    Mode,
    ModeFacts,
    PretrainConfig,
    of_family,
)
from .setting import (
    LOCAL,
    Need,
    Section,
    check_arguments,
    check_local,
    check_size,
    check_size_text,
    explain,
    in_mode,
    setting,
    value_of,
)

Metric = Literal["auto", "top1", "loss", "knn", "probe", "distance"]
AUTO: Final = "auto"
"""Of the student's model and pooling: as the weights have it that the student starts from."""
SAME: Final = "same"
"""Of the student's model: as the teacher's, with fresh weights or others."""


LOADS_TEACHER = Need(
    lambda run: run.reads_teacher or run.starting_source == TEACHER,
    "with mode={run.mode}, whose student starts from {run.start}: leave it out",
)
NAMES_TEACHER = Need(
    lambda run: run.teacher.source is not None or run.starting_source == TEACHER,
    "without a teacher: leave it out, or set teacher.source",
)
TAUGHT = Need(
    lambda run: run.facts.taught,
    "with mode={run.mode}, in which no teacher takes part in a step: leave it out",
)
PREPARES_TEACHER = Need(
    lambda run: run.facts.transfers,
    "with mode={run.mode}, which neither compiles nor shards it: leave it out, or set mode=transfer",
)
READS_WEIGHTS = Need(
    lambda run: (run.reads_teacher and run.teacher.source is not None) or run.starting_source is not None,
    "without weights to read: leave it out, or set teacher.source or student.init",
)


class TeacherConfig(Section):
    """The frozen model that is copied or distilled."""

    source: str | None = setting(
        None,
        "timm name, hf-hub:org/name[@revision], local-dir:path, .safetensors or .pth",
        LOADS_TEACHER,
        also=("teacher",),
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit on the hub; the loaded commit is written to the run's config.yaml, and a resumed run "
        "loads that commit",
        LOADS_TEACHER,
        NAMES_TEACHER,
    )
    model: str | None = setting(
        None, "timm architecture, for a weights file that does not name its own", LOADS_TEACHER, NAMES_TEACHER
    )
    model_args: JsonDict = setting(
        {}, "keyword arguments of the teacher's timm constructor", LOADS_TEACHER, NAMES_TEACHER
    )
    img_size: int | tuple[int, int] | None = setting(
        None, "image size of the teacher's input, to which it is resampled; the student's by default", TAUGHT
    )
    position_embedding: Literal["timm", "mae", "published"] = setting(
        "timm",
        "method to resample position embeddings: timm's antialiased bicubic, MAE's plain bicubic, or as the published "
        "code of the model does",
        READS_WEIGHTS,
    )

    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "type of the teacher's weights: half of the memory with bf16 or fp16", TAUGHT
    )
    compile: bool = setting(
        False, "compilation of the teacher's forward pass by torch.compile", PREPARES_TEACHER, resume="free"
    )
    shard: bool = setting(
        False,
        "sharding of the teacher's weights over the processes by FSDP2, for one larger than a device",
        PREPARES_TEACHER,
        resume="free",
    )

    _check_size = field_validator("img_size")(check_size)
    _check_size_text = field_validator("img_size", mode="before")(check_size_text)
    _check_arguments = field_validator("model_args")(check_arguments)

    def image_size(self, student: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        """Return the size of the teacher's images: the given size, else the student's, if that is given."""
        return self.img_size or self.model_args.get("img_size") or student


BUILT_HERE = Need(
    lambda run: run.student.whole_name is None,
    "with student.model={run.student.whole_name}, which brings its own architecture: leave it out",
)
POOLED = Need(lambda run: run.facts.pools, "with mode={run.mode}, whose student is not pooled: leave it out")
RUNS_BLOCKS = Need(
    lambda run: not run.facts.aligns,
    "with mode={run.mode}, which trains layers apart from their blocks: leave it out",
)
DRAWS_WEIGHTS = Need(
    lambda run: run.starting_source is None or run.facts.draws_head,
    "with a student that starts from {run.starting_source}: leave it out",
)


def with_plan(why: str) -> Need:
    """Return the condition of settings that a layer plan reads."""
    return Need(lambda run: run.student.plan is not None, f"without {why}: leave it out, or set student.plan")


class StudentConfig(Section):
    """The model that learns. It is a timm model; a layer plan or a copying method changes its attention. A student that
    starts from weights (`student.init`, and every student of `mode=finetune` and `mode=align`) is built as the model of
    these weights: architecture, arguments, image size and pooling are theirs, unless you give others. The plan and the
    log warn of a final norm or a head that is fresh although the weights bring their own."""

    model: str = setting(
        AUTO,
        "timm architecture of a fresh student, or the source of an existing one (local-dir:…, hf-hub:…, a file); same: "
        "the teacher's, with its arguments, image size and pooling; auto: that of the weights it starts from, else "
        "vit_base_patch16_224",
        also=("model",),
    )
    model_args: JsonDict = setting(
        {},
        "keyword arguments of the student's timm constructor, beside those of the weights it starts from",
        BUILT_HERE,
        also=("model_args",),
    )
    plan: str | None = setting(
        None, "operator of each layer, such as '*: linear; 9-11: softmax'; the architecture's own by default"
    )
    calibrate: int = setting(
        0,
        "training images on which the operators of the plan are fitted and calibrated before the first step; hash "
        "needs it",
        with_plan("new operators"),
        ge=0,
    )
    without: tuple[Literal["bias"], ...] = setting(
        (),
        "parts of a pyramid's layers that a plan gives up where an operator does not take them: bias, the relative "
        "position bias (Swin)",
        with_plan("student.plan, which gives parts up"),
    )
    init: str | None = setting(
        None,
        "initial weights: any teacher source, or 'teacher' for the teacher's weights; by default the teacher's in the "
        "modes align and finetune, else fresh",
        also=("finetune",),
    )
    img_size: int | tuple[int, int] | None = setting(
        None,
        "input resolution; by default that of the weights it starts from, else the architecture's",
        also=("img_size", "input_size"),
    )
    global_pool: Literal["auto", "avg", "token", "map", ""] | None = setting(
        AUTO,
        "pooling before the head; auto: that of the weights it starts from, else avg; none: the architecture's",
        POOLED,
        BUILT_HERE,
    )
    drop_path: float = setting(0.0, "stochastic depth rate of the last block", RUNS_BLOCKS, ge=0, lt=1)
    pos_embed_std: float | None = setting(
        None,
        "deviation of the fresh position embeddings; the architecture's own by default",
        DRAWS_WEIGHTS,
        gt=0,
    )
    mirror_teacher: bool = setting(
        False,
        "a student with the teacher's native parts (LayerScale, registers, ...), freshly initialized",
        BUILT_HERE,
        Need(
            lambda run: not run.follows_teacher or run.student.model not in (AUTO, SAME),
            "with a student that is its teacher's model and has its parts: leave it out",
        ),
    )
    grad_checkpointing: bool = setting(
        False, "recomputation of block activations in the backward pass", RUNS_BLOCKS, resume="free"
    )
    compile: bool = setting(
        False, "compilation of the step's forward by torch.compile, as one graph", resume="free"
    )

    _check_size = field_validator("img_size")(check_size)
    _check_size_text = field_validator("img_size", mode="before")(check_size_text)
    _check_arguments = field_validator("model_args")(check_arguments)

    @field_validator("model_args")
    @classmethod
    def _check_own(cls, arguments: JsonDict) -> JsonDict:
        """Refuse arguments in whose place other settings work."""
        for key in ("data.num_classes", "student.global_pool"):
            name = key.partition(".")[2]
            if name in arguments:
                raise ValueError(f"{name} changes nothing here: leave it out, or set {key}")
        return arguments

    @property
    def whole_name(self) -> str | None:
        """The source of a whole model that `model` is; None for a timm architecture."""
        text = self.model
        if text in (AUTO, SAME) or not (":" in text or "/" in text or split_part(text)[0].exists()):
            return None
        base = text.partition(".")[0]
        return None if base and not {*base} & {*":/"} and _is_architecture(base) else text


def _is_architecture(name: str) -> bool:
    """Return whether timm knows an architecture. Only a path that could be the name of one comes here."""
    from timm.models import is_model

    return bool(is_model(name))


class DataConfig(Section):
    """The data set and its augmentation."""

    dataset: str = setting(
        "",
        "timm data set name (folder by default): torch/cifar10, hfds/..., wds/..., or digits; for a detector or "
        "segmenter coco, ade20k or cityscapes",
    )
    data_path: str | None = setting(
        None, "root folder of the data set", IN_A_FOLDER, outside=True, also=("data_dir",)
    )
    stage: Annotated[str | None, LOCAL] = setting(
        None,
        "folder on a node's local disk to which each node copies the data set once; in '$TMPDIR' each node uses "
        "its own value",
        outside=True,
        see="[staging](data.md#staging)",
    )
    train_split: str = setting("train", "split to train on")
    val_split: str | None = setting(
        "validation", "split to evaluate on; none turns evaluation off", *EVALUATES, off=(None,)
    )
    download: bool = setting(
        False, "download of the data set by torchvision", of_family("torch", "tfds", "hfids"), outside=True
    )
    image_column: str | None = setting(
        None,
        "column of the images in hfds and hfids, feature in tfds, file ending in wds; guessed by default",
        of_family("hfds", "hfids", "tfds", "wds"),
    )
    label_column: str | None = setting(
        None,
        "column of the labels in hfds and hfids, feature in tfds, field of the .json in wds; guessed by default",
        of_family("hfds", "hfids", "tfds", "wds"),
    )
    classes: str | list[str] | None = setting(
        None,
        "classes of a larger set to keep: names joined by commas, imagenet-100, or a text file with one name per line",
        CLASSIFIES,
    )
    num_classes: int | None = setting(
        None, "number of classes; read from the data set by default", also=("nb_classes",)
    )
    train_samples: int | None = setting(
        None, "number of training samples to use, balanced over classes; all by default", gt=0
    )
    label_seed: int = setting(0, "seed that chooses the train_samples", SUBSET)
    val_samples: int | None = setting(
        None,
        "number of validation images to evaluate on, the same in every run and balanced over classes; all by default",
        *EVALUATES,
        gt=0,
        see="[some images](data.md#folders)",
    )
    batch_size: int = setting(32, "images per device and step", gt=0, le=LARGEST_BATCH)
    eval_batch_size: int | None = setting(
        None,
        "images per device in evaluation; batch_size by default",
        *EVALUATES,
        gt=0,
        le=LARGEST_BATCH,
        resume="free",
    )
    workers: int = setting(4, "loader processes per device", ge=0, outside=True, also=("num_workers",))
    views: int | None = setting(
        None,
        "number of augmented views of each image: epoch e shows view e modulo this number; 0 shows images without "
        "augmentation, as evaluation does; a new view each epoch by default",
        CLASSIFIES,
        ge=0,
    )
    keep_views: Annotated[str | None, LOCAL] = setting(
        None,
        "folder that keeps the images of data.views as bytes, so that each is decoded and augmented once; on a disk of "
        "all nodes",
        CLASSIFIES,
        VIEWED,
        BYTES,
        outside=True,
        see="[kept views](scale.md#kept-views)",
    )
    aug_repeats: int = setting(
        1,
        "repeated augmentation: an epoch shows one image in this many, each this many times with other augmentation; 3 "
        "in DeiT, PVT and LIT-Ti",
        CLASSIFIES,
        FRESH_VIEWS,
        gt=0,
        see="[below](#repeated-augmentation)",
    )
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "area range of the random resized crop", CLASSIFIES, AUGMENTED, CROPPED, drawn=True
    )
    hflip: float = setting(
        0.5, "probability of a horizontal flip", AUGMENTED, CROPPED, ge=0, le=1, drawn=True, off=(0.0,)
    )
    aa: str | None = setting(
        "rand-m9-mstd0.5-inc1",
        "timm auto-augment policy, 'affine' for digits, or none",
        CLASSIFIES,
        Need(lambda run: run.data.views != 0 or run.data.aa == "affine", NO_VIEWS),
        drawn=True,
    )
    color_jitter: float = setting(
        0.0, "strength of color jitter with aa=none", CLASSIFIES, AUGMENTED, JITTERED, ge=0, drawn=True
    )
    interpolation: Literal["bicubic", "bilinear", "random"] | None = setting(
        None,
        "interpolation of resizing; the weights' own by default, and in evaluation also with random",
        CLASSIFIES,
        *RESIZED_AT_RANDOM,
        drawn=True,
    )
    crop_pct: float | None = setting(
        None, "share of a side that evaluation keeps; the weights' own by default", CLASSIFIES, gt=0, le=1
    )
    crop_mode: Literal["center", "squash", "border"] | None = setting(
        None, "timm's crop mode in evaluation; the weights' own by default", CLASSIFIES
    )
    reprob: float = setting(
        0.0, "probability of random erasing", CLASSIFIES, AUGMENTED, ge=0, le=1, drawn=True
    )
    mixup: float = setting(0.0, "mixup alpha", CLASSIFIES, ge=0)
    cutmix: float = setting(0.0, "cutmix alpha", CLASSIFIES, ge=0)
    smoothing: float = setting(0.1, "label smoothing", CLASSIFIES, LABELED, ge=0, lt=1, off=(0.0,))
    max_bad_images: float = setting(
        0.01,
        "share of a split's images (below 1), or their number (from 1 on), that may be unreadable; a run with more, or "
        "with a class that lost most of its images, stops",
        ge=0,
        outside=True,
    )

    @property
    def kind(self) -> str:
        """The name of the data set, or the word for a folder."""
        return self.dataset or "folder"

    @property
    def family(self) -> str:
        """The kind of the data set, such as `torch` of `torch/cifar10`."""
        return self.dataset.partition("/")[0].lower()

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

    @field_validator("stage", "keep_views")
    @classmethod
    def _check_folder_name(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.strip():
            raise ValueError(
                "a folder has a name; quote a variable, as in '$TMPDIR': the shell put nothing in"
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


def beside(setting: str, what: str) -> Need:
    """Return the condition of a setting of `optim` whose place another one takes."""
    why = f"beside {setting}={{run.{setting}}}, which is {what}: leave one of them out"
    return Need(lambda run: value_of(run, setting) is None, why, instead=setting)


def scheduled(kind: str) -> Need:
    """Return the condition of settings that one schedule reads."""
    why = f"with optim.schedule={{run.optim.schedule}}: leave it out, or set optim.schedule={kind}"
    return Need(lambda run: run.optim.schedule == kind, why)


ScheduleKind = Literal["cosine", "steps", "poly"]
BELOW_LENGTH = Need(
    lambda optim: optim.max_steps is not None or not 0 < optim.warmup_epochs >= optim.epochs,
    "optim.epochs={run.epochs}, so the learning rate would never reach its peak: leave it out, or lower it (0 for no "
    "warm-up)",
    of="section",
    finding="is not below",
)


class OptimConfig(Section):
    """Optimizer, schedule and length."""

    epochs: int = setting(
        100,
        "passes over the training set",
        beside("optim.max_steps", "the length of the run"),
        gt=0,
        resume="free",
    )
    max_steps: int | None = setting(None, "number of steps, in place of epochs", gt=0, resume="free")
    opt: str = setting("adamw", "timm optimizer name")
    lr: float | None = setting(None, "absolute learning rate; blr x effective batch / 256 by default", gt=0)
    blr: float = setting(
        1e-3, "base learning rate for 256 images", beside("optim.lr", "the learning rate itself"), gt=0
    )
    min_lr: float = setting(1e-6, "least learning rate, that of the end", ge=0)
    schedule: ScheduleKind = setting(
        "cosine",
        "fall of the learning rate: half a cosine, a tenth after each of optim.milestones, or optim.power of the part "
        "of the run that is left",
    )
    milestones: list[PositiveFloat] = setting(
        [], "epochs after which the learning rate is a tenth", scheduled("steps")
    )
    power: float = setting(0.9, "power of the part of the run that is left", scheduled("poly"), gt=0)
    warmup_epochs: float | None = setting(
        None, "linear warm-up from zero; by default 5, and at most a tenth of the run", BELOW_LENGTH, ge=0
    )
    warmup_steps: int | None = setting(
        None, "linear warm-up in steps", beside("optim.warmup_epochs", "the same in epochs"), ge=0
    )
    weight_decay: float = setting(0.05, "weight decay", ge=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "betas of Adam")
    layer_decay: float = setting(1.0, "learning rate factor from each layer to the one below it", gt=0, le=1)
    clip_grad: float | None = setting(None, "largest gradient norm", gt=0)
    accum_iter: int = setting(1, "batches accumulated before an optimizer step", gt=0, resume="free")
    recipe_batch: int | None = setting(
        None,
        "images per step of the published recipe; the plan and the log say by how much a run differs",
        gt=0,
    )
    ema: float | None = setting(
        None, "decay of the student's moving average; off by default", gt=0, lt=1, also=("model_ema_decay",)
    )
    scales: dict[str, PositiveFloat] = setting(
        {},
        "learning rate factors of parameters, by a regular expression of their names; where several match, they "
        "multiply",
    )
    lora: int | None = setting(
        None, "rank of LoRA adapters that learn instead of the attention weights; needs peft", gt=0
    )
    trainable: str = setting(".*", "regular expression of the parameters that learn; the head always learns")


class EngineConfig(Section):
    """The device, and how the loop runs."""

    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "precision of autocast")
    tf32: bool = setting(
        False, "rounding of the inputs of float32 matrix products to TF32 on a GPU; off is exact float32"
    )
    fsdp: bool | Literal["node"] = setting(
        False,
        "sharding of the student by FSDP2 instead of replication: over all processes, or with node over those of a "
        "node, whose shards other nodes replicate",
        resume="free",
    )
    device: Literal["auto", "cpu"] = setting("auto", "device; cpu uses no GPU", resume="free")
    log_interval: int = setting(
        20, "optimizer steps between log records; the only device synchronization", gt=0, outside=True
    )
    eval_every: int = setting(1, "epochs between evaluations", *EVALUATES, gt=0, resume="free")
    metric: Metric = setting(
        "auto",
        "metric that chooses the best state; auto is top1 if labels and head match, else the distance to the teacher "
        "or the run's own loss, on the test images",
        resume="free",
        see="[evaluation](evaluation.md#in-a-run)",
    )
    patience: int | None = setting(
        None,
        "number of evaluations without a better value of the metric that end the run",
        gt=0,
        resume="free",
    )
    save_every: int | None = setting(
        None, "optimizer steps between states; each epoch by default", gt=0, outside=True
    )
    save_minutes: float | None = setting(
        None, "minutes without a state after which the next step saves one too", gt=0, outside=True
    )
    keep_states: int = setting(
        0,
        "number of newest states to keep under their step, besides last, previous and best",
        ge=0,
        outside=True,
    )
    stop_grace: float = setting(
        300.0,
        "seconds after a stop signal in which a step or an evaluation batch must end; else the run ends without a "
        "save",
        gt=0,
        outside=True,
    )
    evaluate_start: bool = setting(
        False,
        "evaluation of the student before its first step too: the accuracy after conversion alone",
        *EVALUATES,
        resume="free",
    )
    resume: Literal["auto", "never"] = setting(
        "auto", "resumption: auto continues the run in output_dir if it holds one", outside=True
    )
    trackers: tuple[str, ...] = setting(
        ("tensorboard",),
        "trackers that record curves: any that accelerate knows, such as tensorboard, wandb or mlflow",
        outside=True,
        see="[trackers](runs.md#trackers)",
    )
    evaluate_teacher: bool = setting(
        True, "report of the teacher's accuracy at the start if it has a head", resume="free"
    )
    progress: bool = setting(True, "progress bar on a terminal", outside=True)
    report: bool = setting(
        True,
        "verdict of a run at its end: lines, verdict.json and report.html in the run folder",
        outside=True,
        see="[the verdict](runs.md#the-verdict)",
    )


class RunConfig(Section):
    """Everything a run needs; written to the run folder as config.yaml."""

    mode: Mode = setting("transfer", "what the run trains, and from what")
    output_dir: Annotated[Path, LOCAL] = setting(Path("runs/default"), "the run folder", outside=True)
    seed: int = setting(0, "seed", ge=0)
    imports: list[str] = setting(
        [],
        "packages to import first, which register operators, methods or families of your own",
        outside=True, also=("import",), see="[packages of your own](extending.md)",
    )  # fmt: skip
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, TeacherConfig] = setting(
        {},
        "further teachers by name for transfer.losses, as in '{convnext: {source: convnext_base}}'",
        in_mode("transfer"),
    )
    student: StudentConfig = StudentConfig()
    transfer: TransferConfig = TransferConfig()
    align: AlignConfig = AlignConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    pretrain: PretrainConfig = PretrainConfig()
    dense: DenseConfig = DenseConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, check: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        """Check the values. Raises ConfigError, of wrong values with pydantic's ValidationError as its cause."""
        import_packages(
            values.get("imports") if isinstance(values, Mapping) else None
        )  # first: they add names
        try:
            return check(values)
        except ValidationError as error:
            raise explain(error, cls) from error

    @property
    def facts(self) -> ModeFacts:
        """What is known of the mode."""
        return MODE_FACTS[self.mode]

    @property
    def needs_labels(self) -> bool:
        """True if the run learns from labels; others take any images, and may have no validation split."""
        return self.facts.learns_labels and not (self.facts.transfers and self.transfer.task_weight == 0)

    @property
    def starting_source(self) -> str | None:
        """The weights that the student starts from: a source, or `TEACHER`; None for fresh ones."""
        return self.student.init or self.student.whole_name or self.facts.starts_from

    @property
    def follows_teacher(self) -> bool:
        """True if the student starts from its teacher's weights, or is built as its teacher's model."""
        return self.student.model == SAME or self.starting_source == TEACHER

    @property
    def start(self) -> str:
        """The weights that the student starts from, in words."""
        return self.starting_source or "fresh weights"

    @property
    def reads_teacher(self) -> bool:
        """True if a teacher is loaded at all, to learn from or to start from."""
        student = self.student
        starts = student.init in (None, TEACHER) or student.mirror_teacher or student.model == SAME
        return self.facts.taught or (self.facts.starts_from == TEACHER and starts)

    @property
    def evaluates(self) -> bool:
        """True if the run opens the test images."""
        return self.data.val_split is not None and (self.facts.classifies or self.engine.metric != AUTO)

    @property
    def copies(self) -> bool:
        """True if the student runs with a teacher's attention, also after the run."""
        return self.facts.transfers and any(facts_of(loss.method).copies for loss in self.transfer.terms)
