"""Load a model, or weights to start from, from any source."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from os import PathLike
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from timm.models import get_model_args, split_model_name_tag
from torch import Tensor, nn
from typing_extensions import Unpack

from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.conversion import plan_size, resize, with_plan
from ..models.converted import MARK, converted_layers, drop_other_operators, drop_parts, is_mark, read_mark
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copied import copying_of
from ..models.errors import CheckpointError, ConfigError, Json, JsonDict, UnsupportedModelError, check_types
from ..models.families import (
    any_family,
    check_patches,
    classifier_of,
    family_of,
    find_family,
    image_size,
    patch_size,
    sites,
    vit,
)
from ..models.families.pvt import PVT
from ..models.families.towers import PLAN, is_transformers
from ..models.given import Model, as_model
from ..models.plan_syntax import plan_text
from .architecture import (
    build,
    check_description,
    check_name,
    check_published,
    check_settings,
    check_windows,
    converted,
    infer_architecture,
    known_fields,
    published_config,
    read_timm,
)
from .class_names import read_names
from .copying_students import described_architecture, make_whole, refuse_as_start
from .fit import (
    Method,
    check_dtype,
    fit,
    late_size,
    refuse_not_finite,
    resize_loaded,
    source_grid,
    without_values,
)
from .model_folders import ModelFolder, Opened, open_source, read_folder, read_weights_file
from .preprocessing import Preprocessing, input_size
from .provenance import Pretrained, carry, digest_weights, terms_of
from .report import LoadReport, some
from .sources import FileSource, TimmSource, source_text
from .transformers_models import load_tower
from .weight_files import Weights, as_pair

logger = logging.getLogger(__name__)
MADE_HERE = "a model made in Python"
"""The source of a model that was not loaded."""


class LoadSettings(TypedDict, total=False):
    """The keywords of `load_pretrained`, for what passes them on; a test holds the two equal."""

    model: str | None
    model_args: Json | None
    img_size: int | tuple[int, int] | None
    num_classes: int | None
    position_embedding: Method
    revision: str | None
    bare: bool
    identified: bool
    download: bool
    keep: bool
    mapped: bool


@check_types("source")
def load_pretrained(
    source: str | PathLike[str] | Opened,
    *,
    model: str | None = None,
    model_args: Json | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    position_embedding: Method = "timm",
    revision: str | None = None,
    bare: bool = False,
    identified: bool = False,
    download: bool = True,
    keep: bool = False,
    mapped: bool = False,
) -> Pretrained:
    """Load a model and freeze it.

    Args:
        source: timm name, `hf-hub:org/name[@revision]`, `local-dir:path`, or a weights file; `#ema`, `#teacher`
            or `#student` behind a path takes that one of the models in it. Or one that is open already.
        model: timm architecture of a file that does not name its own; of a plain ViT it is read from the shapes.
        model_args: further keyword arguments of timm's constructor.
        img_size: resolution to resample the position embeddings to; that of the weights by default.
        num_classes: 0 drops the head; by default the model has the head that the weights have, or none.
        position_embedding: how they are resampled, timm's way, MAE's, or that of the model's published code, which a
            PVT then keeps for images of any size (its argument `resampling`).
        revision: branch, tag or commit on the hub, whatever `source` says.
        bare: of a student that copies its teacher's attention, its own weights alone, as a plain model whose
            attention was never trained.
        identified: also compute the digest of the weights: a second or two for a large model.
        download: False for a model without weights, on the meta device, where they are published under a timm name.
        keep: also keep what was read from the source, for a student that starts from it.
        mapped: leave the weights in their .safetensors file, in its own type, and read each where it is used.

    Returns:
        The model, in eval mode and without gradients, with what is known of it.

    Raises:
        CheckpointError: one sentence that names what is missing, damaged, unsafe, or does not fit.
        ConfigError: an argument is of another type.
        UnsupportedModelError: the model does not take images of this size.
    """
    asked = {key: value for key, value in (model_args or {}).items() if value is not None}
    opened = source if isinstance(source, Opened) else open_source(source_text(source), revision)
    weights = make_whole(read_source(opened, asked, download=download), load_pretrained, bare=bare)
    asks = weights, opened.text, asked, model, img_size, num_classes, position_embedding
    loaded = _load(*asks, mapped=mapped)
    if mapped and any(parameter.is_meta for parameter in loaded.model.parameters()):
        loaded = _load(*asks)  # some are not in the weights, and start as the model's own
    digest = digest_weights(weights) if identified and not without_values(weights.tensors) else None
    return replace(loaded, digest=digest, weights=weights if keep else None)


def _load(
    weights: Weights, source: str, asked: JsonDict, model: str | None, img_size: int | tuple[int, int] | None,
    num_classes: int | None, position_embedding: Method, *, mapped: bool = False,
) -> Pretrained:  # fmt: skip
    """Build the model of `weights` and load them; the arguments are those of `load_pretrained`."""
    later = late_size(weights, asked, img_size, model)
    if later is not None:
        mapped = False
        img_size, asked = None, {key: value for key, value in asked.items() if key != "img_size"}
    plan = plan_model(weights, asked, model, img_size, num_classes)
    tensors = plan.weights.tensors
    built = build(
        plan.architecture, plan.arguments, within=tensors, on_meta=without_values(tensors), mapped=mapped
    )
    check_patches(built)
    if position_embedding == "published" and isinstance(built, PVT):
        built.set_resampling("bilinear")
        plan.arguments["resampling"] = "bilinear"
    report = fit(
        built,
        plan.weights,
        role="teacher",
        method=position_embedding,
        classifiers=plan.classifiers,
        mapped=mapped,
    )
    if later is not None:
        report = resize_loaded(built, later, position_embedding, report)
        plan.arguments.update(img_size=later, plan_size=plan_size(built))
        copying = copying_of(built)
        if copying is not None:
            plan.arguments["copied"] = copying.to_json()
    loaded = _describe(built, source, plan, report)
    if img_size is not None and image_size(built) is None and not plan.config.get("fixed_input_size"):
        channels = loaded.preprocessing.input_size[0]
        shown = replace(loaded.preprocessing, input_size=(channels, *as_pair(img_size)))
        loaded = replace(loaded, preprocessing=shown)
        if any_family(built) is not None:
            resize(built, shown.input_size[1:])
    family = find_family(built)
    if family is not None and not family.sized_when_built and image_size(built) is None:
        resize(built, loaded.preprocessing.input_size[1:])
    if not without_values(tensors):
        logger.info("%s", report)
    return loaded


@runtime_checkable
class HoldsPretrained(Protocol):
    """An object that knows more of its model than the model itself, such as a `DualViT`."""

    def to_pretrained(self) -> Pretrained:
        """Return the model with its description."""


@check_types("thing")
def describe(thing: Model | Pretrained, role: str = "model", **how: Unpack[LoadSettings]) -> Pretrained:
    """Return the model that `thing` is, holds or names, as `as_model` takes it, with what is known of it.

    `how` is of a source by name, as of `load_pretrained`. Raises as `as_model` and `describe_model`.
    """
    if isinstance(thing, str | PathLike):
        return load_pretrained(source_text(thing), **how)
    for name in how:
        raise ConfigError(f"{name} is of a source by name, and {role} is a model that is built already")
    if isinstance(thing, Pretrained):
        return thing if is_transformers(type(thing.model)) else _as_it_is(thing)
    if isinstance(thing, HoldsPretrained) and not isinstance(thing, type):
        return thing.to_pretrained()
    return describe_model(as_model(thing, role))


def _as_it_is(known: Pretrained) -> Pretrained:
    """Return a description of a loaded model with what was changed in it since."""
    changed = _changed(known.model)
    size = (known.preprocessing.input_size[0], *changed.get("img_size", known.preprocessing.input_size[1:]))
    return replace(
        known,
        model_args={**known.model_args, **_written(known.model, known.architecture), **changed},
        preprocessing=replace(known.preprocessing, input_size=size),
        has_head=changed.get("num_classes", 0) > 0,
        label_names=_of_so_many(known.label_names, changed),
    )


def _of_so_many(names: tuple[str, ...] | None, arguments: Json) -> tuple[str, ...] | None:
    """Return the names of classes where they are as many as the head has."""
    return names if names is not None and len(names) == arguments.get("num_classes") else None


def describe_model(model: nn.Module, **own: Any) -> Pretrained:
    """Describe a model that timm created as `load_pretrained` describes one that it loaded; where its weights come from
    is not known. `own` overrides fields of its `pretrained_cfg`, such as mean and std.

    Raises CheckpointError: timm did not create it.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if is_transformers(type(model)):
        raise CheckpointError(
            f"this {type(model).__name__} is a model of transformers: save it by its save_pretrained, a student after "
            "release()"
        )
    if name is None:
        raise CheckpointError(
            f"this {type(model).__name__} does not say its timm name: make it by timm.create_model, or load it by "
            "graftvit.load"
        )
    if not hasattr(model, "num_classes"):
        raise UnsupportedModelError(
            f"this {type(model).__name__} gives maps and no classes or features, as with features_only=True: give the "
            "model that timm makes without it"
        )
    arguments = {**_written(model, name), **_changed(model)}
    terms = terms_of(model)
    return Pretrained(
        model=model,
        source=MADE_HERE,
        architecture=split_model_name_tag(name)[0],
        preprocessing=Preprocessing.of(model, **own),
        license=terms.license,
        revision=None,
        has_head=vit(model).num_classes > 0,
        report=LoadReport("Python", "a model", 0),
        model_args=arguments,
        label_names=_of_so_many(terms.label_names, arguments),
        provenance=terms.provenance or {},
    )


def _written(model: nn.Module, name: str) -> JsonDict:
    """Return the arguments that a model was built with, without functions that change nothing but a norm's epsilon.

    The epsilon is written by itself. A function that changes more stays, and is refused where it would be written.
    """
    arguments: JsonDict = get_model_args(model)
    plain = {key: value for key, value in arguments.items() if not callable(value)}
    if len(plain) == len(arguments):
        return arguments
    both = repr(model), repr(build(name, plain, on_meta=True))
    shown, twin = (re.sub(r"(LayerNorm\(.*)eps=[^,)]+", r"\1", each) for each in both)
    return plain if shown == twin else arguments


def _changed(model: nn.Module) -> JsonDict:
    """Return what may have changed since a model was built: its classes, and the size of its images."""
    head, size = classifier_of(model), image_size(model)
    classes = head.out_features if isinstance(head, nn.Linear) else getattr(model, "num_classes", None)
    return ({} if classes is None else {"num_classes": classes}) | (
        {} if size is None else {"img_size": size}
    )


@dataclass(frozen=True)
class ModelPlan:
    """A model that belongs to weights: how timm builds it, and the weights under its names."""

    architecture: str
    arguments: JsonDict
    weights: Weights
    config: Json
    """timm's description of the model."""

    @property
    def classifiers(self) -> tuple[str, ...]:
        return _classifiers(self.config)


def plan_model(
    weights: Weights,
    asked: Json,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> ModelPlan:
    """Return the model for `weights`; the arguments are those of `load_pretrained`, `asked` its model_args.

    Raises CheckpointError: the architecture is not known, or timm cannot build it so.
    """
    weights = _with_marked_plan(_with_architecture(weights, model), asked)
    config = _described(weights)
    arguments = {**weights.model_args, **asked}
    classes = num_classes if num_classes is not None else asked.get("num_classes")
    arguments["num_classes"] = _num_classes(weights, _classifiers(config)) if classes is None else classes
    if "fc_norm.weight" in weights.tensors and "norm.weight" not in weights.tensors:
        arguments.setdefault("global_pool", "avg")
    arguments["pretrained_cfg"] = _without_origin(config, weights) | {"custom_load": False}
    weights, size = _target_size(weights, arguments, asked, img_size)
    if size is not None:
        arguments["img_size"] = size
    return ModelPlan(split_model_name_tag(str(weights.architecture))[0], arguments, weights, config)


@check_types()
def load_weights(
    model: nn.Module,
    source: str | PathLike[str] | Weights,
    *,
    position_embedding: Method = "timm",
    replanned: bool = False,
    take: Callable[[dict[str, Tensor]], object] | None = None,
) -> LoadReport:
    """Load any source, or what was read from one, into `model`, to continue training from it.

    A head that is absent or of another size stays fresh, and so does the final norm where the pooling
    differs; the report says it. With `replanned`, for a model that was converted by a plan of its own, so does an
    operator where the weights have another. A model on the meta device, or one for weights without values, is held
    against them by the shapes alone. With `take`, that gets the tensors by the model's names, and the model stays as it
    is.

    Raises CheckpointError as `load_pretrained`.
    """
    weights = source if isinstance(source, Weights) else read_source(source_text(source), {})
    refuse_as_start(weights)
    size = late_size(weights, {}, image_size(model))
    resampled: Mapping[str, str] = {}
    if size is not None and size != weights.img_size:
        twin = _load(weights, weights.origin, {}, None, size, None, position_embedding)
        arguments, resampled = {**weights.model_args, "img_size": size}, twin.report.resampled
        weights = replace(weights, tensors=dict(twin.model.state_dict()), model_args=arguments)
    tensors, left_out = drop_parts(model, converted(model, weights.tensors))
    if replanned:
        tensors, others = drop_other_operators(model, tensors)
        left_out |= others
    weights = replace(weights, tensors=tensors, left_out={**weights.left_out, **left_out})
    config: Json = getattr(model, "default_cfg", None) or {}
    report = fit(
        model,
        weights,
        role="init",
        method=position_embedding,
        classifiers=_classifiers(config),
        take=take,
    )
    return replace(report, resampled={**report.resampled, **resampled})


def read_outline(source: str) -> Pretrained:
    """Return the model of a source without the values of its weights, and these beside it; download no published ones.

    Raises CheckpointError as `load_pretrained`.
    """
    opened = open_source(source)
    check_published(opened.found, {})
    weights = read_source(opened, {}, download=False)
    refuse_as_start(weights)
    plan = plan_model(weights, {})
    model = build(plan.architecture, plan.arguments, within=plan.weights.tensors, on_meta=True)
    described = _describe(model, source, plan, LoadReport(weights.origin, weights.format, 0))
    return replace(described, weights=weights)


def _described(weights: Weights) -> JsonDict:
    """timm's description of the architecture, with what the weights state in place of timm's values."""
    return published_config(described_architecture(weights)) | known_fields(weights.pretrained_cfg)


def read_source(source: str | Opened, arguments: Json, *, download: bool = True) -> Weights:
    """Return the weights of a source under timm's names, with everything that the source records about them.

    Raises CheckpointError: there is no such source, it cannot be read, or what it or `arguments` say of a model cannot
    be meant.
    """
    check_settings("model_args", arguments)
    found = (source if isinstance(source, Opened) else open_source(source)).found
    if isinstance(found, TimmSource):
        return check_description(read_timm(found, arguments, download=download))
    if isinstance(found, ModelFolder) and PLAN in found.config:
        raise CheckpointError(
            f"{found.origin} is a converted tower of transformers, which graftvit.load opens in Python: here give the "
            "model that it was converted from"
        )
    weights = read_weights_file(found) if isinstance(found, FileSource) else read_folder(found)
    return check_windows(check_description(weights))


def _with_architecture(weights: Weights, model: str | None) -> Weights:
    """Return the weights with an architecture: their own, the given one, or the one that their shapes show."""
    own = weights.architecture
    if model is not None:
        check_name(model)
    if own is None and model is None:
        own_parts = {key: tensor for key, tensor in weights.tensors.items() if ".operator." not in key}
        architecture, arguments = infer_architecture(replace(weights, tensors=own_parts))
        note = f"architecture: {architecture}, from the shapes"
        return replace(
            weights,
            architecture=architecture,
            model_args={**arguments, **weights.model_args},
            notes=(*weights.notes, note),
        )
    if own is None:
        # A tag names published weights, and says more of these than their format does.
        described = published_config(str(model)) if split_model_name_tag(str(model))[1] else {}
        return replace(weights, architecture=model, pretrained_cfg={**weights.pretrained_cfg, **described})
    check_name(own)
    if model is not None and split_model_name_tag(model)[0] != split_model_name_tag(own)[0]:
        raise CheckpointError(f"model={model!r}, but {weights.origin} says it is {own!r}; leave model out")
    return weights


def _with_marked_plan(weights: Weights, asked: Json) -> Weights:
    """Return the weights with the plan that the marks of converted layers say, where nothing else says one."""
    marks = {key: tensor for key, tensor in weights.tensors.items() if is_mark(key)}
    name = split_model_name_tag(str(weights.architecture))[0]
    if not marks or name in (CONVERTED, COPIED):
        return weights
    plain = build(name, {**weights.model_args, **asked}, on_meta=True, within=weights.tensors)
    if converted_layers(plain):  # an architecture with a plan of its own
        return weights
    paths = [site.layer_path(plain) for site in sites(plain)]
    choices = tuple(read_mark(path, marks.get(f"{path}.{MARK}")) for path in paths)
    plan, without = plan_text(choices), family_of(plain).gives_up
    architecture, arguments = with_plan(name, weights.model_args, plan, without)
    return replace(
        weights,
        architecture=architecture,
        model_args=arguments,
        pretrained_cfg={**published_config(name), **weights.pretrained_cfg},
        notes=(*weights.notes, f"plan: {plan}, from the marks of the layers"),
    )


def _classifiers(config: Json) -> tuple[str, ...]:
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _without_origin(config: Json, weights: Weights) -> JsonDict:
    """timm's description of the model without what it says of other weights of the same architecture."""
    own = weights.pretrained_cfg
    foreign = {
        "license",
        "description",
        "origin_url",
        "paper_name",
        "paper_ids",
        "notes",
        "tag",
        "label_names",
        "label_descriptions",
    } - own.keys()
    return {key: value for key, value in known_fields(config).items() if key not in foreign}


def _num_classes(weights: Weights, classifiers: tuple[str, ...]) -> int:
    """Return the number of classes of the head in the weights, 0 without a head.

    Raises CheckpointError: half of the head is missing, or the weights state another number.
    """
    parts = [key for key in weights.tensors if key.rpartition(".")[0] in classifiers]
    head = weights.tensors.get(f"{classifiers[0]}.weight")
    if parts and (head is None or not head.ndim or not len(head)):
        shown = some(parts) if head is None else f"{classifiers[0]}.weight {tuple(head.shape)}"
        raise CheckpointError(
            f"{weights.origin} is not whole: it holds {shown}, no whole head; num_classes=0 loads it without"
        )
    said = weights.model_args.get("num_classes")
    if head is not None and said is not None and said != len(head):
        raise CheckpointError(f"{weights.origin} says num_classes={said}, but its head has {len(head)}")
    return 0 if head is None else len(head)


def _target_size(
    weights: Weights,
    arguments: Json,
    asked: Json,
    img_size: int | tuple[int, int] | None,
) -> tuple[Weights, tuple[int, int] | None]:
    """Return the weights under timm's names with the size that they were trained at, and the size to build for."""
    name = split_model_name_tag(str(weights.architecture))[0]
    probe = build(name, arguments, on_meta=True, within=weights.tensors)
    weights = replace(weights, tensors=converted(probe, weights.tensors))
    if weights.img_size is None and asked.get("img_size") is not None:
        weights = replace(weights, model_args={**weights.model_args, "img_size": asked["img_size"]})
    if image_size(probe) is None:  # a network of convolutions, which takes any size
        return weights, None
    wanted = img_size if img_size is not None else asked.get("img_size")
    if wanted is not None:
        return weights, as_pair(wanted)
    grid = source_grid(probe, weights)
    if grid is None:
        return weights, weights.img_size if "img_size" in weights.model_args else None
    height, width = patch_size(probe)
    native = (grid[0] * height, grid[1] * width)
    # The images need not be a multiple of the patch; where they say their own size, that is kept.
    declared = weights.img_size
    same = declared is not None and (declared[0] // height, declared[1] // width) == grid
    return weights, declared if same else native


def _describe(model: nn.Module, source: str, plan: ModelPlan, report: LoadReport) -> Pretrained:
    model.requires_grad_(False)
    model.eval()
    weights, arguments = plan.weights, plan.arguments
    license = weights.pretrained_cfg.get("license")
    label_names = read_names(weights.pretrained_cfg, arguments["num_classes"])
    carry(model, license, label_names, weights.provenance)
    return Pretrained(
        model=model,
        source=source,
        architecture=plan.architecture,
        preprocessing=Preprocessing.read(plan.config, input_size(model, plan.config)),
        license=license,
        revision=weights.revision,
        has_head=arguments["num_classes"] > 0,
        report=report,
        model_args={key: value for key, value in arguments.items() if not key.startswith("pretrained_cfg")},
        provenance=weights.provenance,
        label_names=label_names,
    )


# `graftvit.load`: a model to use or to train, from any source.

DENSE = f"{__package__}.dense_models"
"""What reads and writes detectors and segmenters; by its name, because it stands on this file."""
UNTRAINED_SEED = 20121  # one that nobody takes for a training


@check_types("source")
def load(
    source: str | PathLike[str], *, dtype: torch.dtype | None = None, **how: Unpack[LoadSettings]
) -> nn.Module:
    """Return the model of any source, in eval mode and with gradients: a student (converted ones too) or a teacher.

    A run that trained a detector or segmenter, and its folder, give a `DenseModel`; its `backbone.body` is the model
    inside. A student that copies its teacher's attention has the part of the teacher that it needs, which stays frozen.

    Args:
        source: a folder or file, `hf-hub:org/name`, a timm name; `#ema` behind a run's path takes its average.
        dtype: of the weights, float32 by default, whatever they were saved in; a model that was float64 or bfloat16 is
            the same to the last bit with its own type alone.
        how: `model`, `model_args`, `img_size`, `bare` and the rest, as of `load_pretrained`; but for `num_classes` that
            the weights do not have, the model gets a fresh head.

    Raises:
        CheckpointError: one sentence that names what is missing, damaged, unsafe, or does not fit.
    """
    check_dtype(dtype)
    dense: Any = import_module(DENSE)
    if dense.find_dense(source_text(source)) is None:
        return load_model(source, dtype, how)
    for name in how:
        raise ConfigError(
            f"{name} is of classifiers, and {source} is a detector or segmenter: leave it out, or load its backbone by "
            "graftvit.load_pretrained"
        )
    return dense.load_dense(source).to(dtype or torch.float32)


def load_model(source: str | PathLike[str], dtype: torch.dtype | None, how: LoadSettings) -> nn.Module:
    """Return what `load` returns, and of a detector or segmenter the model inside."""
    opened = open_source(source_text(source), how.pop("revision", None))
    model = load_tower(opened, how)
    if model is None:
        classes = how.pop("num_classes", None) if how.get("num_classes") else None
        model = load_pretrained(opened, **how).model.requires_grad_(True)
        _give_head(model, classes)
    if copying_of(model) is not None:
        vit(model).teacher.requires_grad_(False)
    if dtype is None:
        return model
    tensors = model.state_dict()
    refuse_not_finite(str(source), tensors, dict.fromkeys(tensors, dtype))
    return model.to(dtype)


def _give_head(model: nn.Module, classes: int | None) -> None:
    """Give a model a fresh head where it has none of so many classes."""
    classifier: Any = vit(model)
    if classes is not None and classifier.num_classes != classes:
        classifier.reset_classifier(classes)
        logger.info("the head of %s classes is fresh", classes)


def build_untrained(loaded: Pretrained) -> nn.Module:
    """Return a copy of a model with random weights, the same ones at each call.

    Positions that were resampled to other images have no weights of timm's own start; they are drawn.
    """
    model = copy.deepcopy(loaded.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(UNTRAINED_SEED)
        fresh = dict(build(loaded.architecture, loaded.model_args).named_parameters())
        for name, parameter in model.named_parameters():
            if name in fresh and fresh[name].shape == parameter.shape:
                parameter.copy_(fresh[name])
            else:
                parameter.normal_(std=0.02)
    return model
