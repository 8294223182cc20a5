"""Vision models of transformers that timm does not have, as teachers of features and classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..models.conversion import convert
from ..models.errors import (
    CheckpointError,
    ConfigError,
    Json,
    JsonDict,
    UnsupportedModelError,
    install_command,
)
from ..models.families.towers import PLAN
from ..models.parts import OutsideTeacher
from .class_names import KEY as LABEL_NAMES
from .class_names import read_names
from .formats.hf_families import MODEL_TYPES
from .formats.keymap import IMAGENET
from .model_folders import ModelFolder, Opened
from .preprocessing import Preprocessing
from .provenance import Pretrained, digest_tensors
from .report import LoadReport, shortened, some
from .sources import CONFIG
from .weight_files import INDEX_SUFFIX, as_pair

NAMES = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")
logger = logging.getLogger(__name__)
DROPPED = (
    "auto_map",
    "_attn_implementation",
    "attn_implementation",
    "_name_or_path",
    "experts_implementation",
)
"""Settings of config.json that name code or kernels elsewhere."""
NO_NUMBER = ("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")
"""Settings of config.json that change nothing in what a teacher computes, which is always in float32."""
GRIDS = {"swin": 0, "swinv2": 0, "dinov3_convnext": 1}
"""Tokens before the patches, by types whose last hidden state is a list of patches."""


def load_transformers(
    source: Opened, img_size: int | tuple[int, int] | None = None, timm_settings: Json | None = None
) -> Pretrained | None:
    """Load a vision model of transformers from a folder or the hub; None if the source is anything else.

    Its code is that of the installed package, its weights are safetensors, and its images are those of its image
    processor, at `img_size` if it is given.

    Raises CheckpointError: transformers is not installed, does not have the model, or the model takes no images; or
    `timm_settings`, by name, has a setting of timm's constructor.
    """
    folder = source.found
    if not isinstance(folder, ModelFolder) or not _is_foreign(folder):
        return None
    _refuse(folder, timm_settings or {})
    model, loaded = _load(folder)
    spec = _preprocessing(folder, img_size)
    images = _Images(model)
    found = _probe(folder, images, spec)
    widths = {name: 0 if name not in found else found[name].shape[1] for name in ("pooled", "classes")}
    patches = found.get("patches")
    teacher = OutsideTeacher(
        images,
        feature_width=widths["pooled"],
        patch_width=0 if patches is None else patches.shape[1],
        num_classes=widths["classes"],
        mean=spec.mean,
        std=spec.std,
        img_size=spec.input_size[1:],
    )
    teacher.requires_grad_(False).eval()
    report = LoadReport(folder.origin, "a folder of transformers", loaded, license=folder.license)
    logger.info("%s", report)
    return Pretrained(
        model=teacher,
        source=source.text,
        architecture=type(model).__name__,
        preprocessing=spec,
        license=report.license,
        revision=folder.revision,
        has_head=widths["classes"] > 0,
        report=report,
        label_names=_label_names(folder.config, widths["classes"]),
        config=_without(model.config.to_dict(), (*DROPPED, *NO_NUMBER)),
        digest=digest_tensors(model.state_dict()),
    )


def _refuse(folder: ModelFolder, timm_settings: Json) -> None:
    for name, value in timm_settings.items():
        if value:
            raise CheckpointError(
                f"{name}={value!r} is of a model of timm, and {folder.origin} is one of transformers: leave it out"
            )


def _is_foreign(folder: ModelFolder) -> bool:
    """Return whether config.json names a type that no key map knows."""
    kind = folder.config.get("model_type")
    return isinstance(kind, str) and "architecture" not in folder.config and kind not in MODEL_TYPES


class _Images(nn.Module):
    """A model of transformers as a function of images that returns pooled features, patches and classes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        kept: list[Any] = []
        handle = self.model.base_model.register_forward_hook(lambda _, inputs, out: kept.append(out))
        try:
            out = self.model(pixel_values=images, return_dict=True)
        finally:
            handle.remove()
        base: Mapping[str, Tensor | None] = kept[-1] if kept else out
        results: dict[str, Tensor] = {}
        logits, pooled, hidden = out.get("logits"), base.get("pooler_output"), base.get("last_hidden_state")
        if logits is not None:
            results["classes"] = logits
        if pooled is not None:
            results["pooled"] = pooled.flatten(1)
        patches = None if hidden is None else self._patches(hidden, images)
        if patches is not None:
            results["patches"] = patches
        return results

    def _patches(self, hidden: Tensor, images: Tensor) -> Tensor | None:
        """Return the patches (B, C, rows, columns); None if it is not known how they lie."""
        config = self.model.config
        if hidden.dim() == 4:
            return hidden
        if hidden.dim() != 3 or config.model_type not in GRIDS:
            return None
        stride = getattr(config, "patch_size", 4) * 2 ** (len(config.depths) - 1)
        grid = (images.shape[-2] // stride, images.shape[-1] // stride)
        tokens = hidden[:, GRIDS[config.model_type] :]
        if tokens.shape[1] != grid[0] * grid[1]:
            return None
        return tokens.transpose(1, 2).unflatten(2, grid)


def load_tower(source: Opened, timm_settings: Json) -> nn.Module | None:
    """Return the converted tower of transformers in a folder or on the hub; None if the source is anything else.

    Raises CheckpointError: transformers is not installed or does not have the model, the folder is damaged, or
    `timm_settings`, by name, has a setting of timm's constructor.
    """
    folder = source.found
    plan = folder.config.get(PLAN) if isinstance(folder, ModelFolder) else None
    if not isinstance(folder, ModelFolder) or plan is None:
        return None
    _refuse(folder, timm_settings)
    config = _config(folder)
    [name, *_] = config.architectures or [""]
    kind: Any = vars(import_module(type(config).__module__.replace("configuration", "modeling"))).get(name)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or not isinstance(plan, str):
        raise CheckpointError(
            f"{folder.origin}: config.json says architectures={shortened([name])} and {PLAN}={shortened(plan)}, which "
            "are no model of transformers and its layer plan"
        )
    try:
        read, _ = _fill(folder, _with_operators(kind, plan), config)
        model = convert(kind(config), plan)  # the other has no buffers but those in the weights
    except (ConfigError, UnsupportedModelError) as error:
        raise CheckpointError(f"{folder.origin}: {error}") from error
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    model.load_state_dict(read.state_dict())
    return model.eval()


def _with_operators(kind: type[nn.Module], plan: str) -> type[nn.Module]:
    """Return a class of transformers whose models are converted when they are built."""

    def build(self: nn.Module, *inputs: Any, **keywords: Any) -> None:
        kind.__init__(self, *inputs, **keywords)
        vars(self).update(vars(convert(self, plan)))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _load(folder: ModelFolder) -> tuple[Any, int]:
    """Return the model with its weights, and the number of tensors."""
    config, built = folder.config, _config(folder)
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    names = config.get("architectures") or []
    classifies = any(str(name).endswith("ForImageClassification") for name in names)
    table = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if classifies else MODEL_MAPPING
    if type(built) not in table:
        raise _no_images(folder)
    kinds = table[type(built)]
    model_class = kinds[0] if isinstance(kinds, tuple) else kinds
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise _no_images(folder)
    return _fill(folder, model_class, built)


def _config(folder: ModelFolder) -> Any:
    """Return the configuration of a folder of transformers.

    Raises CheckpointError: transformers is not installed, or does not have the model.
    """
    config, kind = folder.config, str(folder.config.get("model_type"))
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise CheckpointError(
            f"{folder.origin} is a transformers model of type {kind!r}, and transformers is not "
            f"installed: {install_command('transformers')}"
        ) from error
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder.origin} is of type {kind!r}, which the installed transformers does not have; code beside weights "
            "is never run"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder.origin} is quantized, which is not supported: give the original weights"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(_without(config, DROPPED))
    except Exception as error:  # each type checks its settings in its own way
        raise CheckpointError(f"{folder.origin}: transformers refuses its config.json: {error}") from error


def _fill(folder: ModelFolder, model_class: Any, config: Any) -> tuple[Any, int]:
    content = folder.read(NAMES)
    if content is None:
        raise CheckpointError(
            f"{folder.origin} has a {CONFIG} and no {NAMES[0]}: a teacher of transformers is read from safetensors "
            "alone"
        )
    tensors = content.tree
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:
        raise CheckpointError(f"{folder.origin}: its weights do not fit its config.json: {error}") from error
    wrong = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"{folder.origin} is not whole: {some(wrong, 3)} of its model are not in its weights"
        )
    others = [key for key in map(str, info["unexpected_keys"]) if ".operator." in key]
    if others:
        raise CheckpointError(
            f"{folder.origin} has weights of operators that the plan in its {CONFIG} does not name: {some(others, 3)}"
        )
    return model.eval(), len(tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Draw no progress bar: the weights are read already."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def _without(config: Json, left_out: Sequence[str]) -> JsonDict:
    """Return the settings without those of these names, at any depth."""
    return {
        name: _without(value, left_out) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in left_out
    }


def _no_images(folder: ModelFolder) -> CheckpointError:
    return CheckpointError(
        f"{folder.origin} is a transformers model of type {folder.config['model_type']!r}, which is no model of images "
        "alone: use one that AutoModelForImageClassification or AutoModel loads and that takes pixel_values"
    )


def _probe(folder: ModelFolder, images: nn.Module, spec: Preprocessing) -> dict[str, Tensor]:
    """Return the results for one gray image."""
    try:
        with torch.no_grad():
            found: dict[str, Tensor] = images(torch.zeros(1, *spec.input_size))
    except Exception as error:
        raise CheckpointError(
            f"{folder.origin} does not take images of {spec.input_size[1]}x{spec.input_size[2]}: set img_size of this "
            f"teacher to a size that it takes ({error})"
        ) from error
    if not found:
        raise _no_images(folder)
    return found


def _preprocessing(folder: ModelFolder, img_size: int | tuple[int, int] | None) -> Preprocessing:
    """Return mean, deviation and size of preprocessor_config.json; ImageNet's where it says none."""
    said, config = folder.preprocessor, folder.config
    if said.get("do_flip_channel_order") or said.get("rescale_offset"):
        raise CheckpointError(
            f"{folder.origin}: its image processor flips channels or shifts values, which a teacher cannot have here"
        )
    factor = said.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float | int) or abs(factor * 255 - 1) > 1e-3:
        raise CheckpointError(
            f"{folder.origin}: preprocessor_config.json says rescale_factor={factor!r}; a teacher takes 1/255"
        )
    channels = config.get("num_channels", 3)
    statistics: JsonDict = {name: said.get(f"image_{name}") or IMAGENET[name] for name in ("mean", "std")}
    if said.get("do_normalize") is False:
        statistics = {"mean": (0.0,), "std": (1.0,)}
    size = as_pair(img_size) if img_size is not None else _size(said) or _size(config) or (224, 224)
    return Preprocessing.read({**statistics, "crop_pct": 1.0}, (int(channels), *size))


def _size(said: Json) -> tuple[int, int] | None:
    """Return height and width of the images, however the processor or the model says it."""
    for name in ("crop_size", "size", "image_size"):
        value = said.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, list | tuple) and len(value) == 2:
            return as_pair(value)
        if not isinstance(value, Mapping):
            continue
        if "shortest_edge" in value:
            return as_pair(value["shortest_edge"])
        if "height" in value and "width" in value:
            return as_pair((value["height"], value["width"]))
    return None


def _label_names(config: Json, classes: int) -> tuple[str, ...] | None:
    """Return the names of the classes; None for the names that transformers makes up."""
    names = read_names({LABEL_NAMES: config.get("id2label")}, classes)
    return None if names and all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
