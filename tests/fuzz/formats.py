"""Every format that is read: a good file, its damage, and what an independent reader finds in what is left of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
import yaml
from graftvit.checkpoints.pretrained import Teacher, load_teacher
from graftvit.checkpoints.state import TrainingState, read_state, write_state
from graftvit.launch.load_config import dump_config, load_config
from graftvit.models.errors import GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.loading import EvalBatches
from graftvit.transfer.data.sampler import BatchRequest
from hostile import ARCHITECTURE, ARGUMENTS, weights
from hostile_configs import write_model
from hostile_tensors import valid
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .mutations import damage_bytes, damage_json, damage_tensors, damage_yaml

TOKENS = ("pos_embed", "cls_token")
"""What legitimately changes where the number of tokens does."""
IMAGES = ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff")
RECIPE = """seed: 3
student:
  model: vit_tiny_patch16_224
  img_size: 32
data:
  dataset: digits
  num_classes: 10
  batch_size: 32
  crop_scale: [0.5, 1.0]
  smoothing: 0.1
optim:
  lr: 1.0e-3
  epochs: 3
  weight_decay: 0.05
engine:
  precision: fp32
"""


class WrongError(Exception):
    """Something was read, and it is not what is there."""


@dataclass(frozen=True)
class Format:
    """`check` returns where what was read is right, and raises GraftError where it is refused."""

    make: Callable[[Path], object]
    damage: Callable[[Random, Path], str]
    check: Callable[[Path], None]


def _same(found: Mapping[str, Tensor], there: Mapping[str, Tensor], resampled: bool = False) -> None:
    """WrongError unless each tensor found is the one that is there under its name, in its own kind of number."""
    for name, tensor in found.items():
        if name not in there:
            raise WrongError(f"{name} was found, and is not there")
        if resampled and name in TOKENS:
            continue
        wanted = there[name].to(tensor.dtype)
        if tensor.shape != wanted.shape or not torch.equal(tensor, wanted):
            raise WrongError(f"{name} has other numbers than are there")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise WrongError(f"{name} was taken with values that are not finite")


def _hold(teacher: Teacher, there: Mapping[str, Tensor]) -> None:
    """The loaded model has the numbers of the file, knows what its images are, and runs on one of them."""
    prefix = "module." if all(name.startswith("module.") for name in there) else ""
    report = teacher.report
    loaded = {name: t for name, t in teacher.model.state_dict().items() if name not in report.missing}
    changed = bool(report.resampled) or any("positions of" in note for note in report.notes)
    _same(loaded, {name.removeprefix(prefix): tensor for name, tensor in there.items()}, changed)
    if not all(map(math.isfinite, teacher.mean)) or not all(0 < value < math.inf for value in teacher.std):
        raise WrongError(f"images are normalized by {teacher.mean} and {teacher.std}")
    size = teacher.preprocessing.input_size
    if math.prod(size) < 1 << 20:
        with torch.no_grad():
            teacher.model(torch.zeros(1, *size))


# One file of weights.


def _read_torch(path: Path) -> dict[str, Tensor]:
    tree = torch.load(path, map_location="cpu", weights_only=True)
    return dict(tree.get("model", tree))


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "safetensors": safetensors.torch.load_file, "zip": _read_torch, "legacy": _read_torch, "npz": _read_npz
}  # fmt: skip


def _only(folder: Path) -> Path:
    (path,) = (each for each in folder.iterdir() if each.is_file())
    return path


def _rewrite(container: str, path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if container == "safetensors":
        save_file(plain, path)
    elif container == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in plain.items()})
    else:
        torch.save({"model": plain}, path, _use_new_zipfile_serialization=container == "zip")


def _weights_format(container: str) -> Format:
    def damage(rng: Random, folder: Path) -> str:
        path = _only(folder)
        if rng.random() < 0.6:
            return damage_bytes(rng, path)
        tensors, how = damage_tensors(rng, weights())
        if container == "npz" and not all(
            name and "/" not in name and len(name) < 60_000 for name in tensors
        ):
            return damage_bytes(rng, path)  # no zip archive has such a name
        _rewrite(container, path, tensors)
        return how

    def check(folder: Path) -> None:
        teacher = load_teacher(str(_only(folder)), model=ARCHITECTURE, model_args=ARGUMENTS)
        _hold(teacher, READERS[container](_only(folder)))

    return Format(lambda folder: valid(container, folder), damage, check)


# An ONNX file: matrices without names, which their nodes tell; written and read by the package onnx.


def _make_onnx(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors, nodes, initializers = weights(), [], []
    for name, tensor in tensors.items():
        is_linear = tensor.ndim == 2
        held = f"onnx::MatMul_{len(nodes)}" if is_linear else name
        initializers.append(
            numpy_helper.from_array((tensor.t() if is_linear else tensor).numpy().copy(), held)
        )
        if is_linear:
            module = name.removesuffix(".weight").replace(".", "/")
            nodes.append(
                helper.make_node("MatMul", ["x", held], [f"y{len(nodes)}"], name=f"/{module}/MatMul")
            )
    model = helper.make_model(helper.make_graph(nodes, "vit", [], [], initializers), producer_name="test")
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def _read_onnx(path: Path) -> dict[str, Tensor]:
    graph = onnx.load(str(path)).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    modules = {
        node.input[1]: node.name[1:].rpartition("/")[0].replace("/", ".")
        for node in graph.node
        if node.op_type == "MatMul" and len(node.input) > 1
    }
    return {
        f"{modules[name]}.weight" if name in modules else name: tensor.t() if name in modules else tensor
        for name, tensor in tensors.items()
    }


def _check_onnx(folder: Path) -> None:
    teacher = load_teacher(str(folder / "m.onnx"), model=ARCHITECTURE, model_args=ARGUMENTS)
    _hold(teacher, _read_onnx(folder / "m.onnx"))


# Folders: a config.json and weights, in one file or in several.


def _config_format(kind: str) -> Format:
    def check(folder: Path) -> None:
        _hold(load_teacher(f"local-dir:{folder}"), safetensors.torch.load_file(folder / "model.safetensors"))

    return Format(
        lambda folder: write_model(kind, folder),
        lambda rng, folder: damage_json(rng, folder / "config.json"),
        check,
    )


def _make_shards(folder: Path) -> None:
    write_model("plain", folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _damage_shards(rng: Random, folder: Path) -> str:
    if rng.random() < 0.3:
        return damage_bytes(rng, folder / f"model-{rng.randint(1, 2)}.safetensors")
    return damage_json(rng, folder / "model.safetensors.index.json")


def _check_shards(folder: Path) -> None:
    teacher = load_teacher(f"local-dir:{folder}")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    read = {file: safetensors.torch.load_file(folder / file) for file in set(names.values())}
    _hold(teacher, {name: read[file][name] for name, file in names.items()})


# A training state.


def _make_state(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"student.{name}": tensor for name, tensor in weights().items()}
    entry = {"architecture": ARCHITECTURE, "model_args": ARGUMENTS}
    write_state(
        folder / "last.safetensors", TrainingState(tensors, {"student": entry, "position": {"step": 3}})
    )


def _damage_state(rng: Random, folder: Path) -> str:
    path = folder / "last.safetensors"
    if rng.random() < 0.6:
        return damage_bytes(rng, path)
    state = read_state(path)
    scratch = folder / "meta.json"
    scratch.write_text(json.dumps(state.meta))
    how = damage_json(rng, scratch)
    try:
        meta = json.loads(scratch.read_text())
    except (ValueError, RecursionError, MemoryError):
        meta = {"student": "torn"}
    scratch.unlink()
    write_state(path, TrainingState(state.tensors, meta))
    return f"meta {how}"


def _check_state(folder: Path) -> None:
    """A state that reads is bit for bit what was written: its digest says so."""
    path = folder / "last.safetensors"
    there = {f"student.{name}": tensor for name, tensor in weights().items()}
    _same(read_state(path).tensors, there)
    _hold(load_teacher(str(path)), weights())


# A recipe.


def _make_recipe(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)


def _check_recipe(folder: Path) -> None:
    path = folder / "recipe.yaml"
    config = load_config(path)
    (folder / "again.yaml").write_text(dump_config(config))
    if load_config(folder / "again.yaml") != config:
        raise WrongError("a configuration that was written is read back as another one")
    values = config.model_dump()
    for section, entries in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            found = values[section][name]
            if (
                isinstance(value, float | int)
                and isinstance(found, float | int)
                and float(value) != float(found)
            ):
                raise WrongError(f"{section}.{name}={value!r} was read as {found!r}")
    for value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise WrongError(f"a setting is {value}")


def _leaves(tree: Any) -> list[Any]:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else None
    return [tree] if inner is None else [leaf for each in inner for leaf in _leaves(each)]


# Images.


def _make_images(folder: Path) -> None:
    inside = folder / "train" / "class"
    inside.mkdir(parents=True)
    ramp = np.arange(24 * 32 * 3, dtype=np.uint32).reshape(24, 32, 3)
    for name in IMAGES:
        Image.fromarray((ramp % 251).astype(np.uint8)).save(inside / name)


def _damage_images(rng: Random, folder: Path) -> str:
    name = rng.choice(IMAGES)
    return f"{name} {damage_bytes(rng, folder / 'train' / 'class' / name)}"


def _pixels(image: Image.Image) -> Tensor:
    """Of a size that all images have, however they were damaged."""
    return torch.from_numpy(np.array(image.resize((32, 24)), np.float32)).permute(2, 0, 1)


def _check_images(folder: Path) -> None:
    source: Any = open_dataset(
        DataConfig(dataset="folder", data_path=str(folder)), "train", 3, training=False
    )
    batches, refused = EvalBatches(source, _pixels, (3, 24, 32), None), []
    for index in range(len(source)):
        batch = batches[BatchRequest(0, index, (index,), 1)]
        refused += [batch.failure] if batch.failure else [bad.reason for bad in batch.bad]
        if batch.images is None or not bool(batch.valid.all()):
            continue
        with Image.open(source.path(index)) as image:
            if not torch.equal(_pixels(image.convert("RGB")), batch.images[0]):
                raise WrongError(f"{source.path(index)} was read as another image")
    if len(refused) > 1:
        raise WrongError(f"one image was changed, and these cannot be read: {refused}")
    if refused:
        raise GraftError(refused[0])


FORMATS: dict[str, Format] = {
    **{container: _weights_format(container) for container in READERS},
    **{f"config of a {kind} model": _config_format(kind) for kind in ("plain", "converted", "copied")},
    "onnx": Format(_make_onnx, lambda rng, folder: damage_bytes(rng, folder / "m.onnx"), _check_onnx),
    "shards": Format(_make_shards, _damage_shards, _check_shards),
    "training state": Format(_make_state, _damage_state, _check_state),
    "recipe": Format(
        _make_recipe, lambda rng, folder: damage_yaml(rng, folder / "recipe.yaml"), _check_recipe
    ),
    "image": Format(_make_images, _damage_images, _check_images),
}


def copy_of(good: Path, folder: Path) -> Path:
    """A fresh copy of a good folder, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(good, folder))
