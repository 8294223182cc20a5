"""`graftvit compare` on photographs and on digits; the cells' numbers are those of their students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import yaml
from graftvit.launch.cli import main
from graftvit.launch.load_config import read_recipe
from support.files.photos import CLASSES
from support.runs.measure import measure

pytestmark = pytest.mark.usefixtures("few_digits")
SMALL = '{"embed_dim": 48, "depth": 2, "num_heads": 3}'
TEACHER = {"data": {"train_samples": 200}, "optim": {"epochs": 2, "warmup_epochs": 1}}
SHORT = {"batch_size": 4, "repeats": 2, "speed_img_size": [], "error_batches": 1}


def write_yaml(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """The record of each cell by its name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.rglob("cell.json"))}


def test_efficient_attention_on_a_folder(photos: Path, tmp_path: Path) -> None:
    plans = read_recipe("efficient_attention_cifar10").compare["plans"]
    short = write_yaml(
        tmp_path / "short.yaml", {"base": "efficient_attention_cifar10", "compare": {**SHORT, "plans": plans}}
    )
    out = tmp_path / "out"
    line = (
        f"compare {short} --dataset folder --data_path {photos} --num_classes {len(CLASSES)} --workers 0 --epochs 1 "
        f"--warmup_epochs 0.5 --batch_size 24 --device cpu --output_dir {out}"
    )
    words = [*line.split(), "--student.model_args", SMALL]
    assert main([*words, "--only", "softmax"]) == 0
    (first,) = out.rglob("cell.json")
    written = first.stat().st_mtime_ns
    assert main(words) == 0
    assert first.stat().st_mtime_ns == written  # what was done stays
    assert (out / "compare.html").is_file()
    found = cells(out)
    assert {record["name"] for record in found.values()} == {"uniform", *plans}
    for name, record in found.items():
        assert record["error"] is None, name
        check(out / "cells" / name / "student", photos, record["scores"][-1])


def check(student: Path, photos: Path, reported: dict[str, Any]) -> None:
    """Anybody measures what is reported."""
    model = graftvit.load(student).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = measure(model, transform, str(photos / "validation"))
    assert 100 * found["right"] / found["images"] == pytest.approx(reported["top1"])
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-4)


def test_one_operator_of_it_alone(photos: Path, tmp_path: Path) -> None:
    """As the recipe's header says, with the layout of ImageNet-100."""
    words = (
        f"train efficient_attention_cifar10 --plan *:performer --dataset folder --data_path {photos} "
        f"--model vit_tiny_d8_patch8_160 --img_size 160 --num_classes {len(CLASSES)} --max_steps 2 --batch_size 8 "
        f"--workers 0 --device cpu --output_dir {tmp_path}"
    ).split()
    assert main([*words, "--student.model_args", SMALL]) == 0
    reported = json.loads((tmp_path / "student" / "config.json").read_text())["graftvit"]["results"]
    check(tmp_path / "student", photos, reported)


def test_operators_on_digits(tmp_path: Path) -> None:
    plans = {name: read_recipe("digits_compare").compare["plans"][name] for name in ("linear", "mixed")}
    write_yaml(tmp_path / "teacher.yaml", {"base": "digits_teacher", **TEACHER})
    compare = {**SHORT, "plans": plans, "teacher_recipe": "teacher.yaml"}
    short = write_yaml(tmp_path / "short.yaml", {"base": "digits_compare", "compare": compare})
    out = tmp_path / "out"
    line = f"compare {short} --max_steps 4 --only teacher,linear,mixed --output_dir {out}"
    assert main(line.split()) == 0
    found = cells(out)
    assert {record["name"] for record in found.values()} == {"teacher", *plans}
    for name, record in found.items():
        assert record["error"] is None, name


@pytest.mark.parametrize("kind", ["digits_hash", "digits_hash_pyramid"])
def test_hashed_attention_by_its_own_stages(kind: str, tmp_path: Path) -> None:
    base = read_recipe(f"{kind}_compare").compare
    write_yaml(tmp_path / "teacher.yaml", {"base": base["teacher_recipe"], **TEACHER})
    compare = {**base, **SHORT, "seeds": [3], "teacher_recipe": "teacher.yaml"}
    short = write_yaml(tmp_path / "short.yaml", {"base": f"{kind}_compare", "compare": compare})
    line = f"compare {short} --max_steps 3 --warmup_epochs 0.1 --output_dir {tmp_path}/out"
    assert main([*line.split(), "--only", "teacher,hash-published,hash-transfer"]) == 0
    found = {record["name"]: record for record in cells(tmp_path / "out").values()}
    assert set(found) == {"teacher", "hash-published", "hash-transfer"}
    assert all(record["error"] is None for record in found.values())
    stages = {name: [score["stage"] for score in record["scores"]] for name, record in found.items()}
    assert stages["hash-published"] == ["zero-shot", "finetune"]
    assert stages["hash-transfer"] == ["zero-shot", "align", "task"]
    hashed, softmax = (found[name]["speeds"][0] for name in ("hash-transfer", "teacher"))
    assert hashed["additions"] > hashed["multiplications"]
    assert abs(softmax["additions"] - softmax["multiplications"]) < 0.05 * softmax["additions"]
