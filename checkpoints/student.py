"""Write a student as a timm folder; timm loads it without this package if it has the architecture."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Unpack

from ..models.attention.base import Fit
from ..models.calibration import Layer
from ..models.conversion import plan_of, with_own_plan, with_plan
from ..models.converted import marks_of
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copied import copying_of, with_copying
from ..models.cost import copied_macs, copied_parameters
from ..models.errors import CheckpointError, ConfigError, Json, JsonDict, check_types
from ..models.families import family_of, pooling_of, refuse_compiled, replaced_methods, vit
from ..models.given import Model
from .architecture import build, published_config
from .atomic import write_file, write_folder
from .class_names import KEY as LABEL_NAMES
from .files import place, read_json
from .fit import check_dtype, own_norm_eps, refuse_changed, refuse_not_finite
from .one_file import write_modeling
from .preprocessing import Preprocessing
from .pretrained import DENSE, LoadSettings, describe
from .provenance import COST, NORM_EPS, Pretrained, carried_license, of_weights
from .provenance import KEY as PROVENANCE
from .report import some
from .sources import CONFIG
from .weight_files import INDEX_SUFFIX, read_file

# Keep the layers of a conversion that are fitted, each in a file of its own until the whole model is written.

FOLDER = "fit"
KEY, RESULT = "graftvit_fit", "result"
WRITTEN = re.compile(
    rf"{FOLDER}|config\.json|modeling_graftvit\.py|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|"
    r"(detector|segmenter)\.(json|safetensors)"
)
"""What this package and timm write into the folder of a model."""


@dataclass(frozen=True)
class FittedLayers:
    """The files `fit/layerNN.safetensors` of the folder that a conversion writes."""

    folder: Path

    def load(self, index: int, key: str) -> Layer | None:
        """Return a layer that was fitted before with the same `key`; None without one, or from a damaged file."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            content = read_file(path, inside=self.folder)
            if content.metadata.get(KEY) != key:
                return None
            result = json.loads(content.metadata[RESULT])
            fit = result["fit"]
            measures = (
                None
                if fit is None
                else {name: (float(before), float(after)) for name, (before, after) in fit.items()}
            )
            before, after = map(float, result["calibration"])
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        return Layer(content.tree, (before, after), None if measures is None else Fit(measures))

    def save(self, index: int, key: str, layer: Layer) -> None:
        """Write a finished layer. Raises WriteFailedError: the disk is full."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.tensors.items()}
        fit = None if layer.fit is None else dict(layer.fit.measures)
        described = {KEY: key, RESULT: json.dumps({"fit": fit, "calibration": layer.calibration})}
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_file(
            self._path(index), lambda temporary: save_file(tensors, temporary, metadata=described), size=size
        )

    def _path(self, index: int) -> Path:
        return self.folder / FOLDER / f"layer{index:02}.safetensors"


def only_fitted(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a conversion left that was killed."""
    return folder.is_dir() and all(path.name == FOLDER for path in folder.iterdir())


SHARD_SIZE = "5GB"
METADATA = {"format": "pt"}
"""What loaders of other libraries ask a .safetensors file for."""

KEPT = ("classifier", "first_conv", "fixed_input_size", "pool_size")
"""Fields of timm's description that are the architecture's and not of some published weights."""


@check_types()
def save(
    model: Model | Pretrained,
    /,
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    standalone: bool = False,
    **how: Unpack[LoadSettings],
) -> Path:
    """Write a model, the student of a `DualViT`, or the model of any source, and return its folder.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads it wherever the architecture is timm's own and
    the weights are in one file; `graftvit.load(FOLDER)` always. Weights keep their bits unless `dtype` is given.

    Args:
        model: of timm, converted, or copying its teacher's attention; a `DualViT`; a detector or segmenter; what
            `load_pretrained` returns; a run folder or file (`#ema` behind it for the moving average), or any other
            source of `load_pretrained`.
        folder: is made, and may hold a model folder with `overwrite` alone.
        dtype: of the floating-point weights, their own by default. `load` makes float32 of any, unless it is told.
        max_shard_size: bytes, or "5GB"; larger weights are spread over several files with an index.
        overwrite: replace a model folder that is there.
        standalone: also write `modeling_graftvit.py`, by whose `load`, and by `transformers.AutoModel`, the model loads
            without graftvit.
        how: of a source: `model_args`, `img_size`, `bare` and the rest, as of `load_pretrained`.

    Raises:
        CheckpointError: as `load_pretrained` and `write_student`, where `folder` holds something, or where an operator
            cannot be `standalone`, because no module defines it.
        UnsupportedModelError: `model` is not a model.
    """
    folder = place(folder)
    check_dtype(dtype)
    refuse_existing(folder, overwrite=overwrite)
    dense: Any = import_module(DENSE)
    whole = dense.dense_of(model)
    if whole is not None:
        asked = {**how, "standalone": standalone}
        given = next((name for name, value in asked.items() if value not in (None, False, {}, "timm")), None)
        if given is not None:
            raise ConfigError(
                f"{given} is of classifiers, and a detector or segmenter is written as it is: leave it out"
            )
        whole = whole if dtype is None else copy.deepcopy(whole).to(dtype)
        return Path(dense.save_dense(whole, folder, overwrite=overwrite))
    known = describe(model, **how)
    _check_whole(known.model)
    write_student(
        known.model,
        folder,
        check=partial(refuse_existing, folder, overwrite=overwrite),
        architecture=known.architecture,
        model_args=known.model_args,
        preprocessing=known.preprocessing,
        license=known.license,
        provenance=known.provenance,
        label_names=known.label_names,
        dtype=dtype,
        max_shard_size=max_shard_size,
        beside=write_modeling if standalone else None,
    )
    return folder


def check_values(model: nn.Module) -> None:
    """Raise CheckpointError for a model without numbers, or with others than tensors."""
    state = model.state_dict().values()
    if not all(isinstance(each, Tensor) for each in state):
        raise CheckpointError(
            "the model holds more than tensors, as a quantized one does: give it before that"
        )
    if any(each.is_meta for each in state):
        raise CheckpointError("the model is on the meta device, without the values of its weights")


def _check_whole(model: nn.Module) -> None:
    """Raise CheckpointError for a model that its state dict does not hold; warn of hooks."""
    check_values(model)
    for name in replaced_methods(model):
        raise CheckpointError(
            f"{name} of the model was replaced, and only weights are written: delete this attribute"
        )
    for name, module in model.named_modules():
        refuse_compiled(module)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not _is_ours(each) for each in hooks):
            warnings.warn(f"{name or 'the model'} has hooks, which are not written", stacklevel=4)


def _is_ours(hook: object) -> bool:
    module = getattr(hook, "__module__", "") or ""
    return module.partition(".")[0] in (__package__.partition(".")[0], "timm", "torch")


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """CheckpointError where writing to `folder` would take away something; a model folder only if asked for."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link: give the folder that it leads to, {folder.resolve()}")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not _holds_model(folder):
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} is there and holds no model: give a new folder")
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} already holds a model: give another folder, or --force (in Python overwrite=True) to replace it"
        )
    other = sorted(path.name for path in folder.iterdir() if not WRITTEN.fullmatch(path.name))
    if other:
        raise CheckpointError(
            f"{folder} also holds {some(other)}, which would be lost: give another folder, or move that elsewhere"
        )


def _holds_model(folder: Path) -> bool:
    """Return whether a folder has a description of a model as timm and this package write it."""
    try:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    except CheckpointError:
        return False
    return isinstance(config, dict) and isinstance(config.get("architecture"), str)


def refuse_to_convert(folder: Path, *, overwrite: bool) -> None:
    """CheckpointError as `refuse_existing`, except for what a conversion left that was killed."""
    if not only_fitted(folder):
        refuse_existing(folder, overwrite=overwrite)


def write_student(
    model: nn.Module,
    folder: Path,
    *,
    architecture: str,
    model_args: Json,
    preprocessing: Preprocessing,
    license: str | None = None,
    provenance: Json | None = None,
    label_names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    check: Callable[[], object] | None = None,
    beside: Callable[[Path], None] | None = None,
    values: Iterable[tuple[str, Tensor]] = (),
) -> None:
    """Write weights and `config.json` of `model` to `folder`, whole or not at all; an older folder is replaced.

    Args:
        architecture: timm name; a tag is dropped, because the weights are no longer the published ones.
        model_args: what timm's constructor needs besides the name to build this model; JSON.
        preprocessing: how its images are made, as it was trained and measured.
        provenance: what the model learned from and how (`provenance.py`); JSON.
        label_names: the classes of its head in their order, where they are known.
        check: as of `write_folder`.
        beside: writes more files into the folder.
        values: the tensors on the CPU that `model` has on the meta device, each written before the next one is taken.

    Raises CheckpointError: these arguments do not build a model with these weights, or one is not JSON;
    with exit code 1 if the disk is full, and the old folder is then intact.
    """
    name, arguments = _whole(model, architecture, model_args)
    arguments = _plain({key: value for key, value in arguments.items() if value is not None})
    found = {**marks_of(model), **model.state_dict()}
    tensors = _apart(found)
    fresh = _check(name, arguments, tensors)
    refuse_changed(model, fresh, name)
    epsilon = own_norm_eps(model, fresh, name)
    made = {**(provenance or {}), **({NORM_EPS: epsilon} if epsilon else {}), **_cost(model)}
    config = _config(model, name, arguments, preprocessing, license) | {PROVENANCE: made}
    if label_names is not None:
        config[LABEL_NAMES] = list(label_names)
    kinds = {
        key: tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        for key, tensor in tensors.items()
    }
    refuse_not_finite(f"the model for {folder}", tensors, kinds)

    if not re.fullmatch(r"0*[1-9]\d*( ?[KMGT]B)?", str(max_shard_size), re.IGNORECASE):
        raise ConfigError(f"max_shard_size={max_shard_size!r}; give bytes, or text such as '5GB'")

    def checked(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
        refuse_not_finite(f"the model for {folder}", dict([item]), kinds)
        return item

    def write(temporary: Path) -> None:
        own = (item for item in tensors.items() if not item[1].is_meta)
        write_tensors(temporary, outlines, itertools.chain(own, map(checked, values)), max_shard_size)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if beside is not None:
            beside(temporary)

    outlines = {
        key: torch.empty(each.shape, dtype=kinds[key], device="meta") for key, each in tensors.items()
    }
    write_folder(folder, write, size=sum(each.nbytes for each in outlines.values()), check=check)


def write_tensors(
    folder: Path,
    outlines: Mapping[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Write tensors to `model.safetensors`, or to several files and an index, each at its place as it comes.

    The files are those of `huggingface_hub.save_torch_state_dict`, which needs all tensors at once. `values` has each
    of `outlines` once, on the CPU, in any order; they get the types of these.

    Raises CheckpointError: one has no value.
    """
    split = split_torch_state_dict_into_shards(dict(outlines), max_shard_size=max_shard_size)
    with ExitStack() as stack:
        places: dict[str, tuple[IO[bytes], int]] = {}
        for name, keys in split.filename_to_tensors.items():
            file: IO[bytes] = stack.enter_context((folder / name).open("wb"))
            header, starts = _header({key: outlines[key] for key in keys})
            file.write(header)
            places |= {key: (file, len(header) + start) for key, start in starts.items()}
        for key, value in values:
            file, start = places.pop(key)
            file.seek(start)
            kept = value.to(outlines[key].dtype).contiguous()
            file.write(kept.view(-1).view(torch.uint8).numpy().data)
            del value, kept  # before the next one comes
    if places:
        raise CheckpointError(f"there are no values of {some(places)}, which the model has")
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **METADATA}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2)
        (folder / f"model.safetensors{INDEX_SUFFIX}").write_text(text, encoding="utf-8")


def _header(outlines: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a .safetensors file, and where each tensor begins behind it.

    safetensors orders the tensors and names their types: it writes the header of empty ones here.
    """
    empty = to_bytes({key: torch.empty(0, dtype=each.dtype) for key, each in outlines.items()}, METADATA)
    fields: JsonDict = json.loads(empty[8:])
    starts: dict[str, int] = {}
    end = 0
    for key in (key for key in fields if key in outlines):
        starts[key], end = end, end + outlines[key].nbytes
        fields[key] |= {"shape": list(outlines[key].shape), "data_offsets": [starts[key], end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU of which none shares its numbers with another, or is a part of something larger."""
    apart, seen = dict[str, Tensor](), set[int]()
    for key, tensor in tensors.items():
        if tensor.is_meta:
            apart[key] = tensor
            continue
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(storage.data_ptr())
        apart[key] = own
    return apart


def _whole(model: nn.Module, architecture: str, arguments: Json) -> tuple[str, JsonDict]:
    """Name and arguments that build `model`: of one that copies attention, those of the student with what it copies."""
    copying = copying_of(model)
    if copying is None:
        return with_own_plan(model, architecture, arguments)
    own = {key: value for key, value in arguments.items() if key != "copied"}
    name = own.pop("student") if architecture == COPIED else architecture
    return with_copying(*with_own_plan(model, name, own), copying)


def check_described(known: Pretrained) -> None:
    """CheckpointError for a model that was changed into what its description does not say."""
    name, arguments = _whole(known.model, known.architecture, known.model_args)
    refuse_changed(known.model, build(name, arguments, on_meta=True), name)


def _cost(model: nn.Module) -> JsonDict:
    """Return what a copying student and the part of its teacher cost, for the card."""
    if copying_of(model) is None:
        return {}
    names = ("student", "teacher")
    costs = zip(copied_parameters(model), copied_macs(model), strict=True)
    return {
        COST: {name: {"parameters": n, "macs": macs} for name, (n, macs) in zip(names, costs, strict=True)}
    }


def _plain(arguments: JsonDict) -> JsonDict:
    for key, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"model_args.{key}={value!r} cannot be written to config.json: give its name"
            ) from error
    return arguments


def _check(architecture: str, arguments: Json, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return what timm builds, on the meta device. CheckpointError where that has other weights than these."""
    fresh = build(architecture, arguments, on_meta=True)
    wanted = {key: tensor.shape for key, tensor in fresh.state_dict().items()}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if wanted != found:
        names = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
        raise CheckpointError(
            f"{architecture} built with {dict(arguments)} has other weights than the student: {some(names)}"
        )
    return fresh


def _config(
    model: nn.Module,
    architecture: str,
    arguments: Json,
    preprocessing: Preprocessing,
    license: str | None,
) -> JsonDict:
    classes = arguments.get(
        "num_classes", vit(model).num_classes
    )  # of a new head, the model may say the old number
    described = {**published_config(architecture), **(getattr(model, "default_cfg", None) or {})}
    pretrained = {key: described[key] for key in KEPT if key in described}
    pretrained |= {
        **preprocessing.described(),
        "num_classes": classes,
        "custom_load": False,
    }
    if license is not None:
        pretrained["license"] = license
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": vit(model).num_features,
        "global_pool": pooling_of(model),
        "model_args": dict(arguments),
        "pretrained_cfg": pretrained,
    }


# Write a converted model as a student folder, with a record of its source.


def write_converted(
    student: nn.Module,
    folder: Path,
    teacher: Pretrained,
    *,
    weights: str,
    calibration: str | None = None,
    overwrite: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write `student`, a conversion of `teacher`'s model, to `folder`.

    Args:
        weights: which of the teacher's weights it has (`models/converted.py`).
        calibration: the images that its operators were calibrated on, in words.
        overwrite: replace a model folder that is there.
        beside: as of `write_student`.

    Raises:
        ConfigError: no layer of it is converted.
        CheckpointError as `write_student`.
    """
    plan = plan_of(student)
    if plan is None:
        raise ConfigError(f"the plan keeps every layer as it is: {other_operator(student)}")
    architecture, arguments = with_plan(teacher.architecture, teacher.model_args, plan)
    made: JsonDict = {
        "version": version("graftvit"),
        "conversion": {
            "source": teacher.source,
            "plan": plan,
            "weights": weights,
            "calibration": calibration,
        },
    }
    if weights != "none":
        made["init"] = of_weights(teacher.source, teacher.report) | {"architecture": teacher.architecture}
    write_student(
        student,
        folder,
        architecture=architecture,
        model_args=arguments,
        preprocessing=teacher.preprocessing,
        license=carried_license(made),
        provenance=made,
        label_names=teacher.label_names if student.num_classes == teacher.model.num_classes else None,
        check=partial(refuse_to_convert, folder, overwrite=overwrite),
        beside=beside,
    )


def other_operator(model: nn.Module) -> str:
    """Return what to name in a plan that changes nothing."""
    return (
        "name an operator or merge: deformable"
        if family_of(model).merges(model)
        else "name an operator other than softmax"
    )
