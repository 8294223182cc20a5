"""Write a detector or segmenter as a folder: its backbone as a plain timm folder, and beside it neck and head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.conversion import sharing_copy, with_own_plan
from ..models.dense import DETECTION, SEGMENTATION
from ..models.dense.dense_model import DenseModel, create_dense
from ..models.errors import CheckpointError, GraftError, JsonDict, check_types
from ..models.small import without_memory
from .architecture import build, one_line
from .files import place, read_json
from .fit import refuse_not_finite
from .formats.containers import BODY, tensors_in_state
from .model_folders import ModelFolder, Opened, open_source
from .pretrained import describe_model, load_model, plan_model, read_source
from .report import some
from .sources import FileSource, FolderSource, parse_source, source_text
from .state import read_meta
from .student import refuse_existing, write_student
from .weight_files import is_state, outline, read_file

NAMES = {DETECTION: "detector", SEGMENTATION: "segmenter"}
"""The names of the two files beside the backbone, .json and .safetensors."""


@check_types()
def save_dense(model: DenseModel, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a detector or segmenter whole or not at all, and return its folder; `load_dense` reads it.

    The backbone is a timm folder: `timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)` gives
    its maps wherever the architecture is timm's own, and `graftvit.load(FOLDER)` always loads it. The last norm, which
    a backbone does not have, is written as a fresh one. Neck, head and norms of the outputs are in
    `detector.safetensors`, how they are built in `detector.json`; `segmenter.*` for segmentation.

    Args:
        model: of `create_dense`.
        folder: is made, and may hold a model folder with `overwrite` alone.
        overwrite: replace a model folder that is there.

    Raises:
        CheckpointError: `folder` holds something, or timm did not make the backbone.
    """
    folder = place(folder)
    refuse_existing(folder, overwrite=overwrite)
    known = describe_model(_with_last_norm(model.backbone.body), mean=model.mean, std=model.std)
    write_student(
        known.model,
        folder,
        check=partial(refuse_existing, folder, overwrite=overwrite),
        architecture=known.architecture,
        model_args=known.model_args,
        preprocessing=known.preprocessing,
        beside=partial(write_beside, model, model.state_dict()),
    )
    return folder


def write_beside(model: DenseModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what a dense model has besides its body, with the values of `tensors`, into the folder of the body."""
    own = {name: each.detach().cpu().clone() for name, each in tensors.items() if not name.startswith(BODY)}
    described = json.dumps({"kind": model.kind, **model.settings}, indent=2) + "\n"
    save_file(own, folder / f"{NAMES[model.task]}.safetensors", metadata={"format": "pt"})
    (folder / f"{NAMES[model.task]}.json").write_text(described, encoding="utf-8")


def find_dense(source: str) -> Path | FileSource | None:
    """Return the folder, or the state of a run, of a dense model that a source names; None where it names none.

    Raises CheckpointError: there is no such source.
    """
    if not isinstance(parse_source(source), FolderSource | FileSource):
        return None
    found = open_source(source).found
    if isinstance(found, ModelFolder):
        return found.path if any(map(Path.is_file, _descriptions(found.path))) else None
    if not isinstance(found, FileSource) or not is_state(outline(found.path).metadata):
        return None
    return found if "dense" in (read_meta(found.path).get("student") or ()) else None


def dense_of(thing: object) -> DenseModel | None:
    """Return the detector or segmenter that is given, named, or the result of a run; None for anything else."""
    if isinstance(thing, DenseModel):
        return thing
    source = getattr(thing, "output_dir", thing)
    if not isinstance(source, str | PathLike) or find_dense(source_text(source)) is None:
        return None
    return load_dense(source)


def _descriptions(folder: Path) -> list[Path]:
    return [folder / f"{name}.json" for name in NAMES.values()]


def _with_last_norm(body: nn.Module) -> nn.Module:
    """Return a copy of a backbone's body that shares its weights, with fresh parts in place of those removed."""
    known = describe_model(body)
    plain = {name: value for name, value in known.model_args.items() if not callable(value)}
    fresh = build(*with_own_plan(body, known.architecture, plain))
    whole = sharing_copy(body)
    parts = dict(whole.named_modules())
    for path, part in fresh.named_modules():
        if type(parts.get(path)) is nn.Identity and part.state_dict():
            parent, _, name = path.rpartition(".")
            whole.get_submodule(parent)._modules[name] = part
    return whole


@check_types()
def load_dense(folder: str | PathLike[str]) -> DenseModel:
    """Return the detector or segmenter that `save_dense` wrote, in eval mode, with the same numbers.

    Args:
        folder: of `save_dense`, or of a run, with `#ema` behind it for its moving average, `#best` for its best state.

    Raises:
        CheckpointError: one sentence that names what is missing or damaged, or does not fit.
    """
    found = find_dense(source_text(folder))
    if found is None:
        raise CheckpointError(
            f"{folder} holds no detector.json or segmenter.json, as save_dense and finished runs write them"
        )
    if isinstance(found, FileSource):
        return _load_state(found)
    described = next(each for each in _descriptions(found) if each.is_file())
    settings = read_json(described)
    if not isinstance(settings, dict) or "body" in settings:
        raise CheckpointError(f"{described} is damaged: it holds other than the settings of a head")
    file = described.with_suffix(".safetensors")
    tensors = read_file(file, inside=found).tree
    refuse_not_finite(str(file), tensors, dict.fromkeys(tensors, torch.float32))
    body = load_model(found, None, {})
    try:
        with without_memory():
            _check(create_dense(body=body, **settings), tensors, file)
        model = create_dense(body=body, **settings)
    except GraftError as error:
        raise CheckpointError(f"{described} and {file.name} do not fit the backbone: {error}") from error
    if {"kind": model.kind, **model.settings} != settings:
        raise CheckpointError(f"{described} is damaged: it lacks settings that save_dense writes")
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def _load_state(source: FileSource) -> DenseModel:
    """Return the model of a training state."""
    content = read_file(source.path)
    tensors = tensors_in_state(content, source.part or "student")
    plan = plan_model(read_source(Opened(str(source.path), source), {}), {})
    settings = read_meta(source.path)["student"]["dense"]
    try:
        model = create_dense(body=build(plan.architecture, plan.arguments, within=tensors), **settings)
        model.load_state_dict(tensors)
    except (GraftError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source.path} is damaged: {one_line(error)}") from error
    refuse_not_finite(str(source.path), tensors, dict.fromkeys(tensors, torch.float32))
    return model.eval()


def _check(model: nn.Module, tensors: JsonDict, file: Path) -> None:
    """Raise CheckpointError for weights that are not those of neck and head."""
    own = {name: each for name, each in model.state_dict().items() if not name.startswith(BODY)}
    wanted, found = (
        {name: (each.shape, each.is_floating_point()) for name, each in part.items()}
        for part in (own, tensors)
    )
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(f"{file} has other weights than its settings say: {some(wrong)}")
