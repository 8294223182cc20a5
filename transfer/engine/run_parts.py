"""The parts of a run and the settings that each reads: a row here for each new setting.

A setting that every run reads is in `EVERY_RUN`, one of a mode in `Mode.reads`, one of a loss in its method's `reads`.
"""

from __future__ import annotations

from ..config import LossConfig
from ..effect import OUTSIDE, Part, check_effect
from ..methods.registry import find_method
from .modes import MODES, TEACHER, Mode, Transfer
from .students import find_whole_name

EVERY_RUN = OUTSIDE | {
    "mode", "seed",
    "student.model", "student.plan", "student.init", "student.img_size", "student.compile",
    "data.dataset", "data.stage", "data.train_split", "data.classes", "data.num_classes", "data.train_samples",
    "data.batch_size", "data.views", "data.crop_pct", "data.crop_mode", "data.mixup", "data.cutmix",
    "optim.max_steps", "optim.opt", "optim.lr", "optim.min_lr", "optim.warmup_epochs", "optim.weight_decay",
    "optim.betas", "optim.layer_decay", "optim.clip_grad", "optim.accum_iter", "optim.recipe_batch", "optim.ema",
    "optim.lora", "optim.trainable", "optim.scales", "engine.device",
    "engine.precision", "engine.tf32", "engine.fsdp", "engine.metric", "engine.patience", "engine.evaluate_teacher",
}  # fmt: skip
"""Read in every mode."""
TEACHER_SOURCE = frozenset({"teacher.source", "teacher.revision", "teacher.model", "teacher.model_args"})


def check_read(mode: Mode) -> None:
    """Raise ConfigError for a setting that changes nothing in the run of `mode`."""
    check_effect(mode.config, run_parts(mode))


def run_parts(mode: Mode) -> list[Part]:
    """Return the parts that a run can have, and which of them this one has."""
    finer = [
        *_method_parts(mode),
        *_teacher_parts(mode),
        *_student_parts(mode),
        *_data_parts(mode),
        *_augmentation_parts(mode),
        *_optimizer_parts(mode),
        *_evaluation_parts(mode),
    ]
    declared = frozenset(key for part in finer for key in part.reads)
    return [Part("every run", EVERY_RUN), *_mode_parts(mode, declared), *finer]


def _mode_parts(mode: Mode, finer: frozenset[str]) -> list[Part]:
    """Return a part for each mode, with the settings that it alone reads; other parts declare the `finer` ones."""
    name = mode.config.mode
    own = Part(f"mode={name}", mode.reads - finer)
    others = [
        Part(f"mode={other}", kind.reads, False, f"with mode={name}: leave it out, or set mode={other}")
        for other, kind in MODES.items()
        if other != name
    ]
    return [own, *others]


def _method_parts(mode: Mode) -> list[Part]:
    """Return the parts of transfer: the method of a single loss, and what the other methods read."""
    if not isinstance(mode, Transfer):
        return []
    drop_path = Part(
        "stochastic depth of student and teacher",
        frozenset({"transfer.share_drop_path"}),
        mode.config.student.drop_path > 0,
        "with student.drop_path=0, which drops no block: leave it out, or set student.drop_path",
    )
    cache = Part(
        "kept targets of teachers",
        frozenset({"transfer.cache_limit"}),
        mode.config.transfer.cache is not None,
        "without transfer.cache: leave it out, or set transfer.cache",
    )
    if mode.config.transfer.losses:
        return [drop_path, cache]
    method = find_method(mode.config.transfer.method)
    standardized = Part(
        "standardized features",
        frozenset({"transfer.standardize_images"}),
        mode.config.transfer.standardize != "none",
        "with transfer.standardize=none: leave it out, or set transfer.standardize",
    )
    every = frozenset(LossConfig.model_fields)
    reads = every if method.reads is None else method.reads | {"method"}
    says = (
        f"with transfer.method={method.name}: leave it out (it reads {', '.join(sorted(reads - {'method'}))})"
    )
    return [
        drop_path,
        cache,
        standardized,
        Part("the method", _keys("transfer", reads) - standardized.reads),
        Part("another method", _keys("transfer", every), False, says),
    ]


def _teacher_parts(mode: Mode) -> list[Part]:
    config = mode.config
    starts = mode.starting_source == TEACHER
    loaded = mode.reads_teacher and config.teacher.source is not None
    none = f"with mode={config.mode}, whose student starts from {mode.starting_source or 'fresh weights'}: leave it out"
    missing = "without a teacher: leave it out, or set teacher.source"
    kept = f"with mode={config.mode}, in which no teacher takes part in a step: leave it out"
    whole = (
        f"with mode={config.mode}, which neither compiles nor shards it: leave it out, or set mode=transfer"
    )
    return [
        Part("the teacher", TEACHER_SOURCE, mode.reads_teacher or starts, none),
        Part("a named teacher", TEACHER_SOURCE - {"teacher.source"}, loaded or starts, missing),
        Part(
            "the teacher's step",
            frozenset({"teacher.dtype", "teacher.img_size"}),
            mode.taught,
            kept,
        ),
        Part(
            "the teacher's compiled or sharded step",
            frozenset({"teacher.compile", "teacher.shard"}),
            mode.prepares_teacher,
            whole,
        ),
        Part(
            "resampled position embeddings",
            frozenset({"teacher.position_embedding"}),
            loaded or mode.starting_source is not None,
            "without weights to read: leave it out, or set teacher.source or student.init",
        ),
    ]


def _student_parts(mode: Mode) -> list[Part]:
    student = mode.config.student
    whole = find_whole_name(student)
    made = f"with student.model={whole}, which brings its own architecture: leave it out"
    blocks = f"with mode={mode.config.mode}, which trains layers apart from their blocks: leave it out"
    return [
        Part(
            "an architecture",
            frozenset({"student.model_args", "student.mirror_teacher"}),
            whole is None,
            made,
        ),
        Part(
            "pooling",
            frozenset({"student.global_pool"}),
            whole is None and mode.pools,
            made
            if mode.pools
            else f"with mode={mode.config.mode}, whose student is not pooled: leave it out",
        ),
        Part(
            "fresh weights",
            frozenset({"student.pos_embed_std"}),
            mode.starting_source is None or mode.draws_head,
            f"with a student that starts from {mode.starting_source}: leave it out",
        ),
        Part(
            "the student's blocks",
            frozenset({"student.drop_path", "student.grad_checkpointing"}),
            mode.runs_blocks,
            blocks,
        ),
        Part(
            "a layer plan",
            frozenset({"student.without"}),
            student.plan is not None,
            "without student.plan, which gives parts up: leave it out, or set student.plan",
        ),
        Part(
            "new operators",
            frozenset({"student.calibrate"}),
            student.plan is not None,
            "without new operators: leave it out, or set student.plan",
        ),
    ]


def _data_parts(mode: Mode) -> list[Part]:
    data = mode.config.data
    family = data.dataset.partition("/")[0].lower()
    named = f"with data.dataset={data.dataset or 'folder'}"
    return [
        Part(
            "a data set in a folder",
            frozenset({"data.data_path"}),
            family != "digits",
            f"{named}, which comes with scikit-learn: leave it out, or set data.dataset",
        ),
        Part(
            "a data set that can be downloaded",
            frozenset({"data.download"}),
            family in ("torch", "tfds", "hfids"),
            f"{named}: leave it out, or set data.dataset to torch/..., tfds/... or hfids/...",
        ),
        Part(
            "a data set with columns",
            frozenset({"data.image_column", "data.label_column"}),
            family in ("hfds", "hfids", "tfds", "wds"),
            f"{named}: leave it out, or set data.dataset to hfds/..., hfids/..., tfds/... or wds/...",
        ),
        Part(
            "a subset",
            frozenset({"data.label_seed"}),
            data.train_samples is not None,
            "without data.train_samples, which it chooses: leave it out, or set data.train_samples",
        ),
        Part(
            "labels",
            frozenset({"data.smoothing"}),
            mode.needs_labels,
            "in a run that learns without labels: leave it out",
        ),
    ]


def _augmentation_parts(mode: Mode) -> list[Part]:
    data = mode.config.data
    affine, augments = data.aa == "affine", data.views != 0
    plain = "with data.views=0, which shows images without augmentation: leave it out"
    alone = "with data.aa=affine, which neither crops nor flips: leave it out, or choose another data.aa"
    jitter = f"with data.aa={data.aa}, in whose place it works: leave it out, or set data.aa=none"
    fixed = "with data.aa=affine, whose interpolation is fixed: leave it out, or choose bicubic or bilinear"
    crops = frozenset({"data.crop_scale", "data.hflip"})
    return [
        Part("augmentation", frozenset({"data.reprob"}), augments, plain),
        Part(
            "repeated augmentation",
            frozenset({"data.aug_repeats"}),
            data.views is None,
            f"beside data.views={data.views}, which fixes the views of an image: leave one of them out",
            shadow="data.views",
        ),
        Part("a policy", frozenset({"data.aa"}), augments or affine, plain),
        Part("timm's augmentation", crops, augments and not affine, alone if augments else plain),
        Part(
            "color jitter",
            frozenset({"data.color_jitter"}),
            augments and (data.aa in (None, "", "none") or "3a" in data.aa),
            jitter if augments else plain,
        ),
        Part(
            "resized images",
            frozenset({"data.interpolation"}),
            data.interpolation != "random" or (augments and not affine),
            fixed if augments else plain,
        ),
    ]


def _optimizer_parts(mode: Mode) -> list[Part]:
    optim = mode.config.optim
    return [
        Part(
            "a rate that goes with the batch",
            frozenset({"optim.blr"}),
            optim.lr is None,
            f"beside optim.lr={optim.lr}, which is the learning rate itself: leave one of them out",
            shadow="optim.lr",
        ),
        Part(
            "a length in epochs",
            frozenset({"optim.epochs"}),
            optim.max_steps is None,
            f"beside optim.max_steps={optim.max_steps}, which is the length of the run: leave one of them out",
            shadow="optim.max_steps",
        ),
    ]


def _evaluation_parts(mode: Mode) -> list[Part]:
    reads = {"data.val_split", "data.eval_batch_size", "engine.eval_every", "engine.evaluate_start"}
    why = (
        "with data.val_split=none, which turns evaluation off: leave it out"
        if mode.config.data.val_split is None
        else f"with mode={mode.config.mode} and engine.metric=auto, which evaluate nothing: leave it out, or set "
        "engine.metric"
    )
    return [Part("evaluation", frozenset(reads), mode.evaluates, why)]


def _keys(section: str, names: frozenset[str]) -> frozenset[str]:
    return frozenset(f"{section}.{name}" for name in names)
