"""The student of a run: a plain timm model, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm.models import get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import nn

from ...checkpoints.architecture import check_name, published_config
from ...checkpoints.class_names import KEY as LABEL_NAMES
from ...checkpoints.model_folders import open_source
from ...checkpoints.preprocessing import Preprocessing
from ...checkpoints.pretrained import load_pretrained
from ...checkpoints.provenance import Pretrained
from ...checkpoints.sources import HubSource, parse_source
from ...checkpoints.transformers_models import load_transformers
from ...models.conversion import with_plan, without_plan
from ...models.copied import Copying, copying_of, with_copying
from ...models.errors import ConfigError, JsonDict, did_you_mean
from ...models.families import check_patches, create_timm_model, pooling_of
from ...models.mirror import mirror_arguments
from ...models.parts import OutsideTeacher
from ...models.small import without_memory
from ..config import AUTO, SAME, RunConfig, StudentConfig, TeacherConfig
from ..data.augment import with_settings
from ..methods.loss_terms import DEFAULT_TEACHER, check_teacher, choose_teachers, placed, term_methods

FRESH = StudentConfig(model="vit_base_patch16_224", global_pool="avg")
"""The model of a student that starts from fresh weights."""

REFUSALS = (TypeError, ValueError, AssertionError, RuntimeError)
"""What timm's constructors raise for arguments that they do not take."""


@dataclass(frozen=True)
class StudentPlan:
    """How to create the student, `timm.create_model(architecture, **arguments)`, and to preprocess its images."""

    architecture: str
    arguments: JsonDict
    preprocessing: Preprocessing
    copying: Copying | None = None
    """The part of its teacher that it runs with, once resolved."""
    label_names: tuple[str, ...] | None = None
    """The classes of its head in order, if known."""

    def meta(self) -> JsonDict:
        """Return the plan as JSON for a state: enough to build the student without the run's settings."""
        name, arguments = self.architecture, self.arguments
        if self.copying is not None:
            name, arguments = with_copying(name, arguments, self.copying)
        known = {} if self.label_names is None else {LABEL_NAMES: list(self.label_names)}
        return {"architecture": name, "model_args": arguments, **self.preprocessing.described(), **known}

    def create(self, drop_path: float = 0.0) -> nn.Module:
        """Create a new model.

        Raises ConfigError: timm refuses the arguments. UnsupportedModelError: it does not take images of this size.
        """
        arguments = {"drop_path_rate": drop_path, **self.arguments}
        try:
            model = create_timm_model(self.architecture, **arguments)
        except REFUSALS as error:
            raise ConfigError(
                f"student.model={self.architecture!r} cannot be built with {self.arguments}: "
                f"{error or 'timm refused them'}{self._pooling_hint(arguments)}"
            ) from error
        check_patches(model)
        return model

    def _pooling_hint(self, arguments: JsonDict) -> str:
        """Return the setting that a student needs which only its pooling keeps from being built."""
        if arguments.get("global_pool") != "avg":
            return ""
        others = {name: value for name, value in arguments.items() if name != "global_pool"}
        try:
            with without_memory():
                create_timm_model(self.architecture, **others)
        except REFUSALS:
            return ""
        return " Give student.global_pool=token (avg is the default)."


def settings_of(start: Pretrained, *, same: bool = False) -> StudentConfig:
    """Return the settings that build the model of weights to start from; `FRESH` where timm cannot build it alone.

    Raises ConfigError: timm cannot, and the student is to be the `same` as its teacher.
    """
    copying = copying_of(start.model)
    if copying is not None or not is_model(start.architecture):
        if same:
            reason = (
                "is no model of timm" if copying is None else "runs with the attention of its own teacher"
            )
            raise ConfigError(
                f"student.model=same: the teacher {start.source} {reason}: give student.model a timm architecture"
            )
        return FRESH
    apart = ("img_size", "num_classes", "global_pool")  # which have settings of their own
    arguments = {name: value for name, value in start.model_args.items() if name not in apart}
    own = {
        "model": start.architecture,
        "model_args": arguments,
        "img_size": start.preprocessing.input_size[1:],
        "global_pool": pooling_of(start.model),
    }
    return FRESH.model_copy(update=own)


def settle_student(config: StudentConfig, start: StudentConfig = FRESH) -> StudentConfig:
    """Return the settings with those of `start`, the model of the initial weights, where the user gave none."""
    model, arguments = (start.model, start.model_args) if config.model in (AUTO, SAME) else (config.model, {})
    plain, own = without_plan(start.model, start.model_args)
    if split_model_name_tag(config.model)[0] == plain:
        arguments = own
    settled = {
        "model": model,
        "model_args": {**arguments, **config.model_args},
        "img_size": config.img_size or (None if "img_size" in config.model_args else start.img_size),
        "global_pool": start.global_pool if config.global_pool == AUTO else config.global_pool,
    }
    return config.model_copy(update=settled)


def find_whole(config: StudentConfig, *, mapped: bool = False) -> Pretrained | None:
    """Return the model that the student continues, in its file if `mapped`; None for a fresh student.

    Raises CheckpointError: it cannot be loaded. ConfigError: it runs with its teacher's attention.
    """
    source = config.whole_name
    whole = (
        None
        if source is None
        else load_pretrained(source, img_size=config.img_size, keep=True, mapped=mapped)
    )
    copying = None if whole is None else copying_of(whole.model)
    if copying is not None:
        raise ConfigError(
            f"student.model={source!r} runs with its teacher's attention and cannot be trained further: write only its "
            f"own weights with `graftvit checkpoint save {source} DIR --bare`, and start from DIR with "
            f"transfer.method={copying.method} with the same teacher"
        )
    return whole


def input_size(config: StudentConfig, whole: Pretrained | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of the student's images, or those of `whole`, without building the model.

    Raises ConfigError: timm does not know the architecture. CheckpointError: it does not know the tag.
    """
    if whole is not None:
        return whole.preprocessing.input_size
    base, _ = split_model_name_tag(config.model)
    if not is_model(base):
        raise ConfigError(f"student.model={config.model!r} is not a timm model: {_suggest(base)}")
    check_name(config.model)
    pretrained = get_pretrained_cfg(config.model)
    channels, height, width = pretrained.input_size if pretrained else (3, 224, 224)
    size = config.img_size or config.model_args.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.model_args.get("in_chans", channels)), int(height), int(width)


def _suggest(name: str) -> str:
    family = [model for model in list_models() if model.startswith(("vit_", "deit", "beit", "eva"))]
    return did_you_mean(name, family).split("valid:")[0] + "`timm.list_models()` names the valid ones"


def plan_student(
    config: StudentConfig,
    num_classes: int,
    teacher: Pretrained | None,
    preprocessing: Preprocessing,
    whole: Pretrained | None = None,
) -> StudentPlan:
    """Plan the student with `num_classes` outputs; it keeps the architecture and plan of `whole`, if given."""
    channels, height, width = preprocessing.input_size
    if whole is not None:
        arguments = {**whole.model_args, "num_classes": num_classes, "img_size": (height, width)}
        architecture = whole.architecture
        if config.plan is not None:
            architecture, arguments = with_plan(architecture, arguments, config.plan, config.without)
        return StudentPlan(architecture, arguments, preprocessing)
    arguments = {
        **config.model_args,
        "num_classes": num_classes,
        "img_size": (height, width),
        "in_chans": channels,
    }
    if config.global_pool is not None:
        arguments["global_pool"] = config.global_pool
    architecture = config.model
    if config.mirror_teacher:
        if teacher is None:
            raise ConfigError("student.mirror_teacher=true needs a teacher: set teacher.source")
        architecture, arguments = mirror_arguments(teacher.model, architecture, arguments)
    if config.plan is not None:
        architecture, arguments = with_plan(architecture, arguments, config.plan, config.without)
    return StudentPlan(architecture, arguments, preprocessing)


def resolve_preprocessing(
    config: RunConfig, origin: Pretrained | None, whole: Pretrained | None = None
) -> Preprocessing:
    """Return the preprocessing of the student's images, for training, evaluation and users of the student.

    It is that of `whole`, else of `origin` (the initial weights or else the teacher), else timm's for the architecture;
    `data.crop_pct`, `data.crop_mode` and `data.interpolation` override it.
    """
    origin = whole or origin
    own = (
        Preprocessing.read(published_config(config.student.model)) if origin is None else origin.preprocessing
    )
    own = Preprocessing.read(own.described(), input_size(config.student, whole))
    return with_settings(own, config.data)


# Which teachers a run names, what its losses learn from them, how they are sharded, and the mistakes in this.


def teacher_settings(config: RunConfig) -> dict[str, TeacherConfig]:
    """Return the settings of all teachers by name."""
    return {DEFAULT_TEACHER: config.teacher, **config.teachers}


def section_of(name: str) -> str:
    """Return the key of the section of a teacher."""
    return name if name == DEFAULT_TEACHER else f"teachers.{name}"


def teachers_of_terms(config: RunConfig) -> list[str]:
    """Return the name of the teacher of each loss."""
    return choose_teachers(config.transfer, list(teacher_settings(config)))


def check_teachers(config: RunConfig) -> None:
    """Raise ConfigError for a teacher without a source, or one that no entry of `transfer.losses` learns from.

    Raises UnsupportedModelError instead if such a run also has a loss whose teacher does not fit it, because that
    mistake comes first for the user.
    """
    for name, teacher in config.teachers.items():
        if name == DEFAULT_TEACHER or not name.isidentifier():
            raise ConfigError(
                f"teachers.{name}: {name!r} cannot be the name of a further teacher; use letters, digits and _, "
                f"and another name than {DEFAULT_TEACHER!r}"
            )
        if teacher.source is None:
            raise ConfigError(
                f"teachers.{name}.source is not set: set it to a timm name, a hub name or a path"
            )
    chosen = teachers_of_terms(config)
    idle = [name for name in config.teachers if name not in chosen]
    if not idle and DEFAULT_TEACHER in chosen:
        return
    _check_fit(config, chosen)
    if idle:
        raise ConfigError(
            f"teachers.{idle[0]} teaches nothing: name it as the teacher of an entry of transfer.losses"
        )
    raise ConfigError(
        "no entry of transfer.losses learns from the section teacher: give one of the named teachers as "
        "teacher.source, and leave `teacher` out of its entries"
    )


def _check_fit(config: RunConfig, chosen: list[str]) -> None:
    """Raise UnsupportedModelError for a loss of layers whose teacher, known without a download, has none."""
    for index, (method, name) in enumerate(zip(term_methods(config.transfer), chosen, strict=True)):
        how = teacher_settings(config)[name]
        if not method.uses_layers or how.source is None or isinstance(parse_source(how.source), HubSource):
            continue
        source = open_source(how.source)
        teacher = load_transformers(source) or load_pretrained(
            source, model=how.model, model_args=how.model_args, download=False
        )
        with placed(config.transfer, index):
            check_teacher(teacher.model, method)


def check_compiles(config: RunConfig, teachers: Mapping[str, Pretrained]) -> None:
    """Raise ConfigError for a teacher of another library that is to be compiled: it may not be one graph."""
    for name, how in teacher_settings(config).items():
        if name in teachers and isinstance(teachers[name].model, OutsideTeacher):
            section = section_of(name)
            for key, compiles in {
                f"{section}.compile": how.compile,
                "student.compile": config.student.compile,
            }.items():
                if compiles:
                    raise ConfigError(
                        f"{key}=true does not go with the teacher {how.source}, which timm lacks: set it to false"
                    )


def check_something_to_learn(config: RunConfig) -> None:
    """Raise ConfigError if every loss has the weight 0."""
    methods, transfer = term_methods(config.transfer), config.transfer
    if transfer.task_weight != 0:
        return
    if all(method.copies for method in methods):
        raise ConfigError(
            f"transfer.task_weight=0 leaves nothing to learn: transfer.method={methods[0].name} has no loss of its own"
        )
    if all(method.copies or term.weight == 0 for method, term in zip(methods, transfer.terms, strict=True)):
        raise ConfigError(
            "transfer.task_weight=0 leaves nothing to learn, because the weight of each transfer loss is 0 too: raise "
            "one of them"
        )


def sharded_teachers(config: RunConfig) -> list[str]:
    """Return the names of the teachers that are sharded."""
    return [name for name, how in teacher_settings(config).items() if how.shard]


def check_sharding(config: RunConfig, processes: int) -> None:
    """Raise ConfigError for a sharded teacher that the run cannot have."""
    names = sharded_teachers(config)
    if not names:
        return
    key = f"{section_of(names[0])}.shard=true"
    if processes == 1:
        raise ConfigError(
            f"{key} shards over processes and this run has one: start it with torchrun, or set it to false"
        )
    compiled = [section_of(name) for name in names if teacher_settings(config)[name].compile]
    others = {
        "student.compile": config.student.compile,
        f"{compiled[0] if compiled else 'teacher'}.compile": bool(compiled),
        "transfer.share_drop_path": config.transfer.share_drop_path,
    }
    for other, chosen in others.items():
        if chosen:
            raise ConfigError(f"{other}=true cannot be used with {key}: set one of them to false")
    if config.transfer.cache is not None:
        raise ConfigError(f"transfer.cache cannot be used with {key}: leave one of them out")
    for method, name in zip(term_methods(config.transfer), teachers_of_terms(config), strict=True):
        if method.copies and name in names:
            raise ConfigError(
                f"{section_of(name)}.shard=true does not go with transfer.method={method.name}, whose student is saved "
                "with its teacher: set it to false"
            )
