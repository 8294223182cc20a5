"""Every format that is read: a good file, its damage, and what an independent reader finds in what is left of it."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
import yaml
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from graftvit.checkpoints.state import read_state
from graftvit.checkpoints.weight_files import read_file
from graftvit.launch.load_config import dump_config, load_config, load_rows
from graftvit.models.errors import GraftError
from graftvit.transfer.analysis.benchmark_cases import Results, read_results
from graftvit.transfer.analysis.compare.comparison_cells import Record, Score, Speed, mean_over_seeds
from graftvit.transfer.analysis.compare.comparison_plots import figures_of, map_figure
from graftvit.transfer.analysis.compare.comparison_report import make_report, records_json, records_table
from graftvit.transfer.analysis.compare.student_cell import load_maps
from graftvit.transfer.analysis.report.ink import write_arrays
from graftvit.transfer.analysis.search_report import write_report
from graftvit.transfer.bench_rows import best_first, merge_rows, read_rows, row_text, write_rows
from graftvit.transfer.cells import load_record, save_record
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.archives import count_images, unpack
from graftvit.transfer.data.coco import CocoImages
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import INDEX, find_images, pack_lists, read_index
from graftvit.transfer.data.loading import EvalBatches, Samples
from graftvit.transfer.data.sampler import BatchRequest
from graftvit.transfer.search.program_search import open_search, recorded_generations, run_search
from graftvit.transfer.target_shards import Shard, TargetForm, TargetRows, TargetShards, add_checksums
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from support.files.dense_scenes import composed, write_coco
from support.files.hostile import ARCHITECTURE, ARGUMENTS, weights
from support.files.hostile_configs import write_model
from support.files.hostile_tensors import valid
from support.runs.benchmark_rows import row
from support.runs.search_runs import search, silent
from torch import Tensor

from .mutations import damage_bytes, damage_json, damage_tensors, damage_yaml
from .segmenter_files import damage_segmenter, make_segmenter, read_segmenter
from .shard_files import damage_shard, make_shard, read_shard
from .state_files import damage_parts, damage_state, make_parts, make_state

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


def _hold(teacher: Pretrained, there: Mapping[str, Tensor]) -> None:
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
        teacher = load_pretrained(str(_only(folder)), model=ARCHITECTURE, model_args=ARGUMENTS)
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
    teacher = load_pretrained(str(folder / "m.onnx"), model=ARCHITECTURE, model_args=ARGUMENTS)
    _hold(teacher, _read_onnx(folder / "m.onnx"))


# Folders: a config.json and weights, in one file or in several.


def _config_format(kind: str) -> Format:
    def check(folder: Path) -> None:
        _hold(
            load_pretrained(f"local-dir:{folder}"), safetensors.torch.load_file(folder / "model.safetensors")
        )

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
    teacher = load_pretrained(f"local-dir:{folder}")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    read = {file: safetensors.torch.load_file(folder / file) for file in set(names.values())}
    _hold(teacher, {name: read[file][name] for name, file in names.items()})


# A training state, in one file and in one of each process.


def _check_state(folder: Path) -> None:
    """A state that reads is bit for bit what was written: its digest says so."""
    path = folder / "last.safetensors"
    there = {f"student.{name}": tensor for name, tensor in weights().items()}
    _same(read_state(path).tensors, there)
    _hold(load_pretrained(str(path)), weights())


def _check_parts(folder: Path) -> None:
    """A state that reads is bit for bit what was written."""
    _same(read_file(folder / "last").tree, {f"student.{name}": tensor for name, tensor in weights().items()})
    _hold(load_pretrained(str(folder / "last")), weights())


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


def _make_index(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "set" / name).mkdir(parents=True)
        for number in range(20):
            (folder / "set" / name / f"{number}.png").touch()
    (folder / INDEX).write_bytes(pack_lists([find_images(folder / "set")]))


def _check_index(folder: Path) -> None:
    lists = read_index(folder / INDEX)
    if not lists:
        raise GraftError("the index is damaged")
    for place, path in zip(lists[0].files, find_images(folder / "set").files, strict=True):
        _equal(Path(path).relative_to(folder), Path(place).relative_to(lists[0].root.parent))


# The records of a search.


def _make_search(folder: Path) -> None:
    run_search(search(folder, population=3), 2, silent)


def _damage_search(rng: Random, folder: Path) -> str:
    path = rng.choice(
        [each for each in sorted(folder.rglob("*")) if each.suffix in (".json", ".safetensors")]
    )
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        tensors, how = damage_tensors(rng, safetensors.torch.load_file(path))
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        return how
    how = damage_bytes(rng, path) if path.suffix == ".safetensors" else damage_json(rng, path)
    if (
        path.name == "cell.json" and path.stat().st_size < 1 << 24 and rng.random() < 0.8
    ):  # by somebody who digests it again
        try:
            record = json.loads(path.read_text())
            digest = open_search(folder)._digest(int(path.parent.name[:3]), record["program"])
            path.write_text(json.dumps(record | {"settings": digest}))
        except (ValueError, TypeError, KeyError, RecursionError, UnicodeError):
            pass
    return f"{path.name} {how}"


def _check_search(folder: Path) -> None:
    found = open_search(folder)
    done = recorded_generations(found)
    for number, each in enumerate(done):
        place = divmod(number, found.settings.population)
        there = json.loads((folder / f"cells/{place[0]:03}-{place[1]:03}/cell.json").read_text())
        _equal(there["program"], each.program)
        _equal(there.get("mismatch"), each.mismatch)
        _equal(there.get("cost", 0), each.cost)
        _equal(list(there.get("parents", ())), list(each.parents))
    write_report(folder)


def _equal(there: object, found: object) -> None:
    """WrongError unless a value was read as it is there; `"3"` may stand for 3."""
    if isinstance(found, float | int) and isinstance(there, str | float | int):
        there, found = float(there), float(found)
    if there != found:
        raise WrongError(f"{str(there)[:80]!r} was read as {str(found)[:80]!r}")


# Rows of the benchmark.


def _make_rows(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = load_rows(Path("attnbench_digits"))
        write_rows([*rows[:3], *(row for row in rows if row.status == "refused")][:5], folder / name)

    return make


def _damage_rows(rng: Random, folder: Path) -> str:
    path = folder / "rows.jsonl"
    if rng.random() < 0.4:
        return damage_bytes(rng, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    number, scratch = rng.randrange(len(lines)), folder / "line.json"
    scratch.write_text(lines[number], encoding="utf-8")
    how = damage_json(rng, scratch)
    if scratch.stat().st_size > 1 << 24:
        scratch.replace(path)
        return how
    content = [line.encode() for line in lines]
    content[number] = scratch.read_bytes().replace(b"\n", b" ")
    scratch.unlink()
    path.write_bytes(b"\n".join(content) + b"\n")
    return how


def _check_rows(path: Path, there: Callable[[Path], list[Any]]) -> None:
    found = read_rows(path)
    for each, values in zip(found, there(path), strict=True):
        _equal(values["program"], each.program)
        _equal(values.get("seed", 0), each.seed)
        _equal(values.get("latency"), each.latency)
        for point, wanted in zip(each.curve, values.get("curve", ()), strict=True):
            pairs = wanted.items() if isinstance(wanted, dict) else zip(point._fields, wanted, strict=True)
            for name, value in pairs:
                _equal(value, getattr(point, name))
    for each in best_first(found):
        row_text(each)
    merge_rows([found])


def _read_lines(path: Path) -> list[Any]:
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[: None if lines[-1] else -1]]


def _read_parquet(path: Path) -> list[Any]:
    rows: list[Any] = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    return rows


# What teachers computed, kept by `transfer.cache`.


BATCH = torch.arange(6.0).reshape(6, 1, 1, 1)


def _shards(folder: Path) -> TargetShards:
    return TargetShards(str(folder), {"teacher": "a"}, [Samples("a", 6)], TargetForm())


def _targets() -> dict[str, Tensor]:
    return {"logits": torch.arange(60.0).reshape(6, 10), "small": torch.arange(6, dtype=torch.int8)}


def _make_cache(folder: Path) -> None:
    shards = _shards(folder)
    shards.open()
    shards.write(Shard(0, 0, 6), {**_targets(), **add_checksums(0, range(6), BATCH, str)})


def _damage_cache(rng: Random, folder: Path) -> str:
    path = next(folder.rglob("*.rows" if rng.random() < 0.8 else "*.json"))
    return damage_bytes(rng, path) if path.suffix == ".rows" else damage_json(rng, path)


def _check_cache(folder: Path) -> None:
    shards = _shards(folder)
    shards.open()
    _same(TargetRows(shards).read(0, range(6), BATCH, str), _targets())


# Archives of images, which data.stage unpacks.


def _make_archive(ending: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        inside = folder / "images" / "train" / "class"
        inside.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(inside / f"{number}.png")
        shutil.make_archive(str(folder / "images"), ending, folder, "images")
        shutil.rmtree(folder / "images")

    return make


def _check_archive(folder: Path) -> None:
    """Each file that comes out has the very bytes of a part of the archive, or of what zip has compressed."""
    path = _only(folder)
    config = DataConfig(dataset="folder", data_path=str(path), stage=str(folder))
    _, room = count_images(path)
    if room > 1 << 20:
        raise GraftError("a disk of one MiB has too little room")
    unpack(path, folder / "out", config, lambda count: None, room=room)
    files = [each for each in (folder / "out").rglob("*") if each.is_file()]
    if sum(each.stat().st_size for each in files) > 1 << 20:
        raise WrongError("more came out of the archive than was put in")
    content = path.read_bytes() if path.suffix == ".tar" and path.stat().st_size < 1 << 24 else None
    for each in files:
        if content is not None and each.read_bytes() not in content:
            raise WrongError(f"{each.name} came out with other bytes")


# The cells of a comparison.


def _make_cell(folder: Path) -> None:
    scores = [Score("zero-shot", 12.5, 50.0, 2.0), Score("task", 80.0, 99.0, 0.5, 3.0, 10)]
    speed = Speed(32, 4, 17, 0.01, 0.009, 0.011, 0.02, 100.0, 50.0, 1 << 20, 10_000, 10_000, 9_000, 9_000)
    errors = {"zero-shot": {0: 0.5, 1: 0.25}}
    save_record(Record("linear", "*: linear", 32, "digest", "cpu", 0.5, None, True, 100, 10, scores, [speed], errors,
                       "teacher", True), folder)  # fmt: skip
    picture, heat = np.zeros((8, 8, 3), np.uint8), np.full((4, 4), 1 / 16, np.float32)
    arrays = {"query": np.array("the class token"), "pictures": np.stack([picture, picture])}
    for name in ("0.0", "0.1", "1.0", "1.1"):
        arrays |= {f"{name}.heat": heat, f"{name}.extent": np.ones(2), f"{name}.grid": np.array((4, 4)),
                   f"{name}.asking": np.array(())}  # fmt: skip
    write_arrays(folder / "attention.npz", arrays)


def _damage_cell(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return damage_bytes(rng, folder / "attention.npz")
    return damage_json(rng, folder / "cell.json")


def _check_cell(folder: Path) -> None:
    record, maps = load_record(Record, folder), load_maps(folder)
    if record is None or maps is None:
        raise WrongError("a file that is there was not found")
    there = json.loads((folder / "cell.json").read_text())
    for score, values in zip(record.scores, there.get("scores", ()), strict=True):
        _equal(values["top1"], score.top1)
    with np.load(folder / "attention.npz", allow_pickle=False) as arrays:
        for (image, layer), each in maps.maps.items():
            if not np.array_equal(each.heat, arrays[f"{image}.{layer}.heat"]):
                raise WrongError("a map has other numbers than are there")
    means = mean_over_seeds([record])
    make_report(means, []).to_markdown()
    records_table(means).to_csv(), records_json(means)
    for figure in [*figures_of(means), map_figure({record.name: maps})]:
        if figure is not None:
            figure.draw("light")


# The results of a benchmark.


def _make_results(folder: Path) -> None:
    Results("operators", "here", [row(), row("softmax", ratio=1.0)]).save(folder)


def _check_results(folder: Path) -> None:
    results = read_results(folder / "results.json")
    there = json.loads((folder / "results.json").read_text())
    for each, values in zip(results.rows, there.get("rows", ()), strict=True):
        _equal(values["median"], each.median)
    results.save(folder)


# Annotations of COCO.


def _make_coco(folder: Path) -> None:
    write_coco(folder, {"val": composed("validation", 3)[:2]}, form="counts")
    write_coco(folder, {"train": composed("train", 1)})


def _damage_coco(rng: Random, folder: Path) -> str:
    name = rng.choice(["instances_val.json", "instances_train.json"])
    return damage_json(rng, folder / "annotations" / name)


def _check_coco(folder: Path) -> None:
    for split in ("val", "train"):
        source = CocoImages(folder, split, training=False, masks=True)
        rows = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())["annotations"]
        for number in range(len(source)):
            _, target = source.read(number)
            own = [row for row in rows if row["image_id"] == target["image_id"]]
            corners = [(x, y, x + width, y + height) for x, y, width, height in (row["bbox"] for row in own)]
            if not np.allclose(target["boxes"], np.reshape(corners, (-1, 4))):
                raise WrongError("an image has other boxes than are there")


# The log of a run.


def _make_log(folder: Path) -> None:
    lines = [{"step": step, "epoch": step // 2, "loss": 1 / (step + 1), "lr": 0.1} for step in range(8)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _check_log(folder: Path) -> None:
    """What is read are lines that are there, in order; what is no object was left out."""
    found = read_records(folder / "log.jsonl")
    lines = iter((folder / "log.jsonl").read_bytes().split(b"\n"))
    for record in found:
        if not any(_is_line(line, record) for line in lines):
            raise WrongError(f"{record} was read, and is not there")


def _is_line(line: bytes, record: object) -> bool:
    try:
        return repr(json.loads(line)) == repr(record)
    except (ValueError, RecursionError):
        return False


FORMATS: dict[str, Format] = {
    **{container: _weights_format(container) for container in READERS},
    **{f"config of a {kind} model": _config_format(kind) for kind in ("plain", "converted", "copied")},
    "onnx": Format(_make_onnx, lambda rng, folder: damage_bytes(rng, folder / "m.onnx"), _check_onnx),
    "segmenter": Format(make_segmenter, damage_segmenter, lambda folder: _same(*read_segmenter(folder))),
    "shards": Format(_make_shards, _damage_shards, _check_shards),
    "training state": Format(make_state, damage_state, _check_state),
    "state of a sharded run": Format(make_parts, damage_parts, _check_parts),
    "recipe": Format(
        _make_recipe, lambda rng, folder: damage_yaml(rng, folder / "recipe.yaml"), _check_recipe
    ),
    "image": Format(_make_images, _damage_images, _check_images),
    "image list": Format(_make_index, lambda rng, folder: damage_bytes(rng, folder / INDEX), _check_index),
    "search": Format(_make_search, _damage_search, _check_search),
    "rows": Format(
        _make_rows("rows.jsonl"), _damage_rows, lambda folder: _check_rows(folder / "rows.jsonl", _read_lines)
    ),
    "cache of targets": Format(_make_cache, _damage_cache, _check_cache),
    "tar of images": Format(
        _make_archive("tar"), lambda rng, folder: damage_bytes(rng, _only(folder)), _check_archive
    ),
    "zip of images": Format(
        _make_archive("zip"), lambda rng, folder: damage_bytes(rng, _only(folder)), _check_archive
    ),
    "cell of a comparison": Format(_make_cell, _damage_cell, _check_cell),
    "results of a benchmark": Format(
        _make_results, lambda rng, folder: damage_json(rng, folder / "results.json"), _check_results
    ),
    "annotations of COCO": Format(_make_coco, _damage_coco, _check_coco),
    "shard of images": Format(make_shard, damage_shard, lambda folder: _same(*read_shard(folder))),
    "log": Format(_make_log, lambda rng, folder: damage_bytes(rng, folder / "log.jsonl"), _check_log),
}
if find_spec("pyarrow"):
    FORMATS["rows in Parquet"] = Format(
        _make_rows("rows.parquet"),
        lambda rng, folder: damage_bytes(rng, folder / "rows.parquet"),
        lambda folder: _check_rows(folder / "rows.parquet", _read_parquet),
    )


def copy_of(good: Path, folder: Path) -> Path:
    """A fresh copy of a good folder, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(good, folder))
