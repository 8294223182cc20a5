"""Evaluate the models that the command line names: choose data, device, models and metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from accelerate import Accelerator
from timm.utils.misc import natural_key
from torch import Tensor, nn

from ..checkpoints.class_names import comparable, same_classes
from ..checkpoints.class_names import places as columns_of
from ..checkpoints.dense_models import find_dense, load_dense
from ..checkpoints.model_folders import last_stage
from ..checkpoints.preprocessing import Preprocessing
from ..checkpoints.pretrained import build_untrained, load_pretrained
from ..checkpoints.provenance import Pretrained
from ..checkpoints.report import some
from ..checkpoints.sources import FolderSource, parse_source
from ..models.copying.teacher_view import Normalization, Renormalized
from ..models.errors import ConfigError, Json
from ..models.families import pooling_of
from ..transfer.config import DataConfig, RunConfig, TeacherConfig
from ..transfer.data.augment import with_settings
from ..transfer.data.labels import check_num_classes, imagenet_names
from ..transfer.data.loaders import (
    EvalLoader,
    Views,
    ViewsLoader,
    create_eval_loader,
    create_reference_loader,
)
from ..transfer.engine.fit_operators import stage_together
from ..transfer.engine.parallel import create_accelerator, host_group
from ..transfer.metrics.distance import ComparedLayers, Reader, compared_layers, describe_features
from ..transfer.metrics.measure import OF_PATCHES, PROBES, Against, Family, check_folders, measure
from .flags import source_keywords
from .load_config import Setting, load_config
from .submitted import check_data, check_here

# The models that `graftvit evaluate` compares: runs, students and teachers, each a function from images to logits.


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to predict: `predict` takes images preprocessed as `spec` describes."""

    name: str
    module: nn.Module
    predict: Callable[[Tensor], Tensor]
    spec: Preprocessing
    num_classes: int
    """The number of classes; 0 if the model has no head."""
    loaded: Pretrained
    """Description by its source."""
    label_names: tuple[str, ...] | None = None
    """The class names of the head in order, if they are known."""


def run_config(source: str) -> RunConfig | None:
    """Return the configuration of the run in the folder `source` (its last stage), or None if `source` is no run."""
    parsed = parse_source(source)
    if not isinstance(parsed, FolderSource):
        return None
    folders = [last_stage(folder) or folder for folder in (parsed.path, parsed.path.parent)]
    found = [folder for folder in folders if (folder / "config.yaml").is_file()]
    return load_config(found[0] / "config.yaml") if found else None


def load_candidate(source: str, how: TeacherConfig) -> Candidate:
    """Load the model of a source.

    Args:
        source: A run folder, a student folder, or any teacher source.
        how: Architecture, arguments and resolution that replace those of the source.

    Raises:
        CheckpointError: if the source cannot be read.
    """
    loaded = load_pretrained(source, **source_keywords(how))
    spec = loaded.preprocessing
    classes = int(getattr(loaded.model, "num_classes", 0)) if loaded.has_head else 0
    return Candidate(source, loaded.model, loaded.model, spec, classes, loaded, loaded.label_names)


def describe_candidate(candidate: Candidate) -> list[str]:
    """Describe the features that kNN and the probe measure, and warn where the teacher has others."""
    name, own = candidate.name, pooling_of(candidate.module)
    lines = [f"kNN and probe of {name}: {describe_features(candidate.module)}"]
    teacher = candidate.loaded.provenance.get("teacher") or {}
    theirs = teacher.get("pooling")
    if theirs is not None and theirs != own:
        lines.append(
            f"warning: {name} is pooled by {own or 'nothing'} and its teacher {teacher.get('source')} by "
            f"{theirs or 'nothing'}: the kNN and probe accuracies of the two are of different features"
        )
    return lines


def check_alike(candidates: list[Candidate]) -> None:
    """Raise ConfigError if the models have different numbers of classes."""
    first = candidates[0]
    for other in candidates[1:]:
        if other.num_classes != first.num_classes:
            raise ConfigError(
                f"{other.name!r} has {other.num_classes} classes and {first.name!r} has {first.num_classes}; "
                "evaluate them one by one"
            )


def _place(spec: Preprocessing, specs: Sequence[Preprocessing]) -> int | None:
    """Return the first of `specs` that makes the same images, apart from their normalization, which is computed."""
    plain = [replace(each, mean=(), std=()) for each in specs]
    own = replace(spec, mean=(), std=())
    return plain.index(own) if own in plain else None


def _shared(candidates: Sequence[Candidate]) -> list[Preprocessing]:
    """Return the preprocessings that the candidates need, each once."""
    specs: list[Preprocessing] = []
    for each in candidates:
        if _place(each.spec, specs) is None:
            specs.append(each.spec)
    return specs


def _side_by_side(make: Callable[[Preprocessing], EvalLoader], specs: Sequence[Preprocessing]) -> EvalLoader:
    """Return one loader of the images as all of `specs` make them."""
    loaders = [make(spec) for spec in specs]
    return loaders[0] if len(loaders) == 1 else ViewsLoader(loaders)


def _view(predict: Callable[[Tensor], Tensor], place: int) -> Callable[[Tensor], Tensor]:
    """Return `predict` for the images of one place of `Views`, or for plain images."""

    def run(images: Tensor | Views) -> Tensor:
        return predict(images.images[place] if isinstance(images, Views) else images)

    return run


def _describe_views(candidates: Sequence[Candidate], specs: Sequence[Preprocessing]) -> list[str]:
    """Describe in what the images of the models differ, a line each; nothing where all take the same ones."""
    names = [field.name for field in fields(Preprocessing) if field.name not in ("mean", "std")]
    differ = [name for name in names if len({str(getattr(spec, name)) for spec in specs}) > 1]
    return [
        f"images of {each.name}: {', '.join(f'{name}={getattr(each.spec, name)}' for name in differ)}"
        for each in candidates
        if differ
    ]


def common_names(candidates: list[Candidate]) -> tuple[str, ...] | None:
    """Return the class names that number the labels of an evaluation: those of the first candidate that has names.

    Raises ConfigError if another candidate has other classes, or may have them in another order.
    """
    named = [(each.name, each.label_names) for each in candidates if each.label_names is not None]
    if not named:
        return None
    first, names = named[0]
    for other in candidates:
        theirs = other.label_names
        if not same_classes(names, theirs):
            foreign = [name for name in theirs or () if name not in names]
            raise ConfigError(
                f"{other.name!r} has classes that {first!r} does not have: {some(foreign, 5)}; evaluate them one by one"
            )
        if not comparable(names, theirs) and list(names) != sorted(names, key=natural_key):
            raise ConfigError(
                f"{other.name!r} does not name its classes, and the classes of {first!r} are not sorted; evaluate "
                "them one by one"
            )
    return names


def reorder(
    predict: Callable[[Tensor], Tensor], own: Sequence[str] | None, names: Sequence[str] | None
) -> Callable[[Tensor], Tensor]:
    """Return `predict` with its logits reordered from the classes `own` to the order of `names`."""
    columns = columns_of(own, names)
    return predict if columns is None else lambda images: predict(images)[:, columns]


def predictor(candidate: Candidate, spec: Preprocessing) -> Callable[[Tensor], Tensor]:
    """Return `candidate.predict` for images that are normalized as `spec` says."""
    own = candidate.spec
    if (own.mean, own.std) == (spec.mean, spec.std):
        return candidate.predict
    mean, std, own_mean, own_std = (
        torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std, own.mean, own.std)
    )
    scale, shift = std / own_std, (mean - own_mean) / own_std

    def predict(images: Tensor) -> Tensor:
        return candidate.predict(images * scale.to(images) + shift.to(images))

    return predict


CLASSIFIED = (
    "data.num_classes", "data.interpolation", "data.crop_pct", "data.crop_mode", "data.train_samples",
    "data.label_seed", "teacher.",
)  # fmt: skip
"""How settings begin of images, labels and weights that a detector or segmenter does not read."""
RANDOM = "random weights"
"""The row of a model that learned nothing: what distances and CKA are worth is seen beside it."""


@dataclass(frozen=True)
class Evaluation:
    """What `graftvit evaluate` is asked to measure."""

    sources: Sequence[str]
    """Run folders, student folders or teacher sources."""
    settings: Sequence[Setting]
    """Settings of `data`, `engine` and `teacher`; other data settings come from the first run among the sources."""
    metrics: Collection[Family]
    """The metrics to measure; with none, those that `_choose_families` chooses."""
    against: str | None = None
    """The source of a teacher from which distances are measured."""
    subset: str | None = None
    """`imagenet-a` or `imagenet-r`."""
    real: bool = False
    """Score against the ReaL labels of ImageNet's validation set."""

    def __post_init__(self) -> None:
        """Raise ConfigError if arguments contradict each other."""
        repeated = [source for source in self.sources if self.sources.count(source) > 1]
        if repeated:
            raise ConfigError(f"checkpoint {repeated[0]!r} is named twice; name each once")
        if "distance" in self.metrics and self.against is None:
            raise ConfigError("--metrics distance needs a model to measure from: add --against TEACHER")
        patches = [family for family in self.metrics if family in OF_PATCHES]
        if patches and (len(patches) < len(self.metrics) or self.subset or self.real):
            other = next(
                (each for each in self.metrics if each not in patches), "subset" if self.subset else "real"
            )
            raise ConfigError(
                f"--metrics {patches[0]} needs labeled pixels, and {other} does not: measure them apart"
            )
        if self.against is not None and self.metrics and "distance" not in self.metrics:
            raise ConfigError(
                "--against has no effect without the metric distance; add distance to --metrics"
            )
        self.check_own_head(self.metrics)

    @cached_property
    def dense(self) -> bool:
        """Whether the sources are detectors or segmenters."""
        return any(find_dense(source) is not None for source in self.sources)

    def _check_dense(self) -> None:
        """Raise ConfigError for classifiers among detectors, and for what only one of both kinds has."""
        sizes = self.section("dense")
        if not self.dense:
            if sizes:
                raise ConfigError(f"{sizes[0].origin} is of detectors and segmenters: leave it out")
            return
        detectors = [source for source in self.sources if find_dense(source) is not None]
        other = next((source for source in self.sources if source not in detectors), None)
        if other is not None:
            raise ConfigError(
                f"{other!r} is no detector or segmenter, as {detectors[0]!r} is: evaluate them one by one"
            )
        given = [f"--{name}" for name in ("metrics", "against", "subset", "real") if getattr(self, name)]
        given += [each.origin for each in self.settings if each.key.startswith(CLASSIFIED)]
        if given:
            raise ConfigError(
                f"{given[0]} is of classifiers, and {self.sources[0]!r} is a detector or segmenter: leave it out"
            )

    def check_own_head(self, metrics: Collection[Family]) -> None:
        """Raise ConfigError if metrics without a model's head are to be measured on labels that only a head has."""
        if (self.real or self.subset is not None) and any(family in PROBES for family in metrics):
            raise ConfigError(
                f"{'--real' if self.real else '--subset'} needs a model's own head and cannot be used with --metrics "
                "knn or probe, which measure a model without a head"
            )

    def section(self, name: str) -> list[Setting]:
        """Return the settings of a section."""
        return [setting for setting in self.settings if setting.key.startswith(f"{name}.")]

    def config(self) -> RunConfig:
        """Return the settings of data and engine, with those of the first run among the sources."""
        self._check_dense()
        imported = [each for each in self.settings if each.key == "imports"]
        others = [*imported, *self.section("data"), *self.section("engine"), *self.section("dense")]
        runs = [config for config in map(run_config, self.sources) if config is not None]
        if not runs:
            return load_config(None, others)
        own = runs[0].data.model_dump(exclude={"stage"})  # a path on the nodes where the run was trained
        if {"data.dataset", "data.data_path"} & {each.key for each in others}:
            own["num_classes"] = None if _is_folder(others, own) else own["num_classes"]
        inherited = {f"data.{name}": value for name, value in own.items()}
        return load_config(None, [*(Setting(name, inherited[name], name) for name in inherited), *others])

    def check(self, *, here: bool = True) -> DataConfig:
        """Return the settings of the data, and raise the errors of `evaluate` that need no loaded model.

        With `here`, models and data must be on this machine.
        """
        if not here:
            return load_config(None, self.settings).data
        sources = [*self.sources, *([] if self.against is None else [self.against])]
        check_here(*sources)
        data = self.config().data
        check_data(data) if self.dense or {*OF_PATCHES} & {*self.metrics} else check_here(data=data)
        return data


def evaluate(asked: Evaluation, tell: Callable[[str], object]) -> dict[str, dict[str, float]]:
    """Measure each source and, if several sources have heads, their ensemble.

    `tell` gets a line about the features that kNN and the probe measure, and warnings about them. Raises GraftError if
    a source cannot be read, or sources, data and metrics do not match.
    """
    config = asked.config()  # first, because it imports what the run did
    if asked.dense:
        return _evaluate_dense(asked.sources, config)
    if any(family in OF_PATCHES for family in asked.metrics):
        return _evaluate_patches(asked, config)
    how = load_config(None, asked.section("teacher")).teacher
    shown = load_config(None, asked.section("data")).data
    candidates = [load_candidate(source, how) for source in asked.sources]
    candidates = [replace(each, spec=with_settings(each.spec, shown)) for each in candidates]
    check_alike(candidates)
    accelerator = create_accelerator(config)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    group = host_group(accelerator) if config.data.stage is not None else None
    data = stage_together(config.data, group)
    specs = _shared(candidates)
    places = {each.name: _place(each.spec, specs) or 0 for each in candidates}
    names, numbered = _choose_numbering(candidates, asked)
    loader = _side_by_side(
        lambda spec: create_eval_loader(data, spec, real=asked.real, labels=False, names=numbered, **ranks),
        specs,
    )
    loader.shown = "evaluation"
    families: dict[str, Collection[Family]] = {
        each.name: asked.metrics or _choose_families(each, loader, asked.against) for each in candidates
    }
    check_labels(candidates, families, loader, config.data, asked)
    reference = None
    if any(family in PROBES for chosen in families.values() for family in chosen):
        reference = _side_by_side(
            lambda spec: create_reference_loader(data, spec, names=numbered, **ranks), specs
        )
        reference.shown = "features of the training images"
    for line in _describe_views(candidates, specs):
        tell(line)
    for candidate in candidates:
        for line in describe_candidate(candidate) if {*PROBES} & {*families[candidate.name]} else ():
            tell(line)
        candidate.module.to(accelerator.device).eval()
    compared: Against | None = None
    untrained: dict[str, Reader] = {}
    if asked.against is not None:
        compared, untrained[RANDOM] = _load_against(asked.against, how, candidates, specs, accelerator)
        families[RANDOM] = ["distance"]
    readers = {
        each.name: Reader(
            each.module,
            _view(
                _autocast(
                    reorder(predictor(each, specs[places[each.name]]), each.label_names, names), accelerator
                ),
                places[each.name],
            ),
            () if compared is None else compared.layers[each.name].student,
        )
        for each in candidates
    }
    return measure(
        {**readers, **untrained},
        families,
        loader,
        reference=reference,
        against=compared,
        accelerator=accelerator,
        subset=asked.subset,
    )


def _evaluate_dense(sources: Sequence[str], config: RunConfig) -> dict[str, dict[str, float]]:
    """Return the average precision of detectors, or the mean intersection over union of segmenters.

    Raises GraftError: they have other classes than the images.
    """
    from ..transfer.engine.dense_tasks import DenseTask  # here: a classifier needs no detector of torchvision
    from ..transfer.metrics.dense_scores import loader_for

    accelerator = create_accelerator(config)
    data = stage_together(config.data, host_group(accelerator) if config.data.stage is not None else None)
    models = {source: load_dense(source) for source in sources}
    loaders = {}
    for source, model in models.items():
        rank, count = accelerator.process_index, accelerator.num_processes
        loaders[source] = loader_for(model, data, config.dense, repr(source), rank=rank, world_size=count)
        loaders[source].shown = f"evaluation of {source}"
    tasks = {source: DenseTask(model.to(accelerator.device).eval()) for source, model in models.items()}
    return {source: task.evaluate(loaders[source], accelerator) for source, task in tasks.items()}


def _evaluate_patches(asked: Evaluation, config: RunConfig) -> dict[str, dict[str, float]]:
    """Return what the patches of each model say of labeled pixels."""
    from ..transfer.metrics.dense_features import PatchProbe  # here: a classifier needs no data of detection

    how, accelerator = load_config(None, asked.section("teacher")).teacher, create_accelerator(config)
    data = stage_together(config.data, host_group(accelerator) if config.data.stage is not None else None)
    results = {}
    for source in asked.sources:
        loaded = load_pretrained(source, **source_keywords(how))
        model = loaded.model.to(accelerator.device).eval()
        results[source] = PatchProbe(model, loaded.preprocessing, data, accelerator).score(asked.metrics)
    return results


def _choose_numbering(
    candidates: Sequence[Candidate], asked: Evaluation
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return the class names that order all logits, and the class names that number the labels of the images.

    ReaL labels and subsets use the numbers of ImageNet. Both are None if no head is scored.
    """
    scored = [each for each in candidates if each.num_classes and "top1" in (asked.metrics or ("top1",))]
    if not asked.real and asked.subset is None:
        names = common_names(scored)
        return names, names
    names = imagenet_names()
    for each in scored:
        if not same_classes(each.label_names, names):
            raise ConfigError(f"--real and --subset need the classes of ImageNet; {each.name!r} has others")
    return names, None


def _was_trained_on(source: str, data: DataConfig) -> bool:
    """Return whether a source is a run on this data set, so that its logits follow the labels of the data set."""
    config = run_config(source)
    return config is not None and (config.data.dataset, config.data.data_path) == (
        data.dataset,
        data.data_path,
    )


def _choose_families(candidate: Candidate, loader: EvalLoader, against: str | None) -> tuple[Family, ...]:
    """Return the default metrics: with labels the model's head, or else kNN; with `against` also distances."""
    labeled: tuple[Family, ...] = ("top1" if candidate.num_classes else "knn",) if loader.num_classes else ()
    return (*labeled, "distance") if against is not None else labeled


def check_labels(
    candidates: Sequence[Candidate],
    families: Mapping[str, Collection[Family]],
    loader: EvalLoader,
    data: DataConfig,
    asked: Evaluation,
) -> None:
    """Raise ConfigError or DataError if the metrics of a candidate need other labels or a head."""
    for candidate in candidates:
        chosen = families[candidate.name]
        if not loader.num_classes and set(chosen) != {"distance"}:
            raise ConfigError(
                "the images have no labels, so the number of classes is unknown: set --num_classes, put each class "
                "into its own folder, or measure distances with --against TEACHER"
            )
        if "top1" in chosen and not candidate.num_classes:
            raise ConfigError(
                f"{candidate.name!r} has no classification head to score; use --metrics knn, probe or distance"
            )
        asked.check_own_head(chosen)
        if "top1" in chosen and asked.subset is None:
            if not _was_trained_on(candidate.name, data):
                check_folders(candidate.name, candidate.num_classes, loader)
            check_num_classes(data, loader.class_names)


def _load_against(
    source: str,
    how: TeacherConfig,
    candidates: Sequence[Candidate],
    specs: Sequence[Preprocessing],
    accelerator: Accelerator,
) -> tuple[Against, Reader]:
    """Load the teacher, and build a model of its architecture with random weights.

    They receive the candidates' images, normalized and resized as the teacher's preprocessing asks: of several sizes
    those of its own size, else those of the first candidate.
    """
    teacher = load_candidate(source, how)
    sizes = [each.input_size for each in specs]
    place = sizes.index(teacher.spec.input_size) if teacher.spec.input_size in sizes else 0
    spec = specs[place]
    model, random = teacher.module, build_untrained(teacher.loaded).to(accelerator.device)
    norms = Normalization(teacher.spec.mean, teacher.spec.std), Normalization(spec.mean, spec.std)
    channels, *size = teacher.spec.input_size
    if channels != spec.input_size[0]:
        raise ConfigError(
            f"--against {source}: it takes images of {channels} channels, but the measured models take "
            f"{spec.input_size[0]}"
        )
    shown = Renormalized(channels, *norms, (size[0], size[1])).to(accelerator.device)
    teacher.module.to(accelerator.device).eval()
    layers: dict[str, ComparedLayers] = {
        each.name: compared_layers(model, each.module) for each in candidates
    }
    layers[RANDOM] = compared_layers(model, random)
    used = {layer for compared in layers.values() for layer in compared.teacher}

    def shown_to(predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return _view(_autocast(lambda images: predict(shown(images)), accelerator), place)

    reader = Reader(random, shown_to(random), layers[RANDOM].student)
    return Against(Reader(model, shown_to(teacher.predict), sorted(used)), layers), reader


def _is_folder(settings: Sequence[Setting], own: Json) -> bool:
    """Return whether the data set is a folder, whose subfolders give the number of classes."""
    given = [str(each.value) for each in settings if each.key == "data.dataset"]
    return (given[-1] if given else own["dataset"]) in ("", "folder")


def _autocast(predict: Callable[[Tensor], Tensor], accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return predict(images)

    return run
