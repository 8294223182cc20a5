"""What the commands do with detectors and segmenters, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.checkpoints.dense_models import load_dense, save_dense
from graftvit.transfer.engine.train import train
from support.runs.dense_runs import run, small_ade20k, small_coco
from support.runs.engine_runs import records
from support.runs.typed import Typed

SHORT = {"epochs": 1}
HERE = ("--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory, coco: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    heads = ("retinanet", "mask_rcnn")
    return [str(train(run(folder / head, coco, head, optim=SHORT)).output_dir) for head in heads]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("segmenter")
    return str(
        train(run(folder / "run", small_ade20k(folder / "ade20k"), "semantic_fpn", optim=SHORT)).output_dir
    )


def scores(typed: Typed, tmp_path: Path, *words: str) -> dict[str, dict[str, float]]:
    typed("evaluate", *words, *HERE, "--json", tmp_path / "scores.json")
    found: dict[str, dict[str, float]] = json.loads((tmp_path / "scores.json").read_text())
    return found


def test_evaluate_gives_what_the_runs_measured(
    tmp_path: Path, typed: Typed, detectors: list[str], segmenter: str
) -> None:
    found = scores(typed, tmp_path, *detectors, f"{detectors[0]}#ema")
    for name in (*detectors, segmenter):
        known = found.get(name) or scores(typed, tmp_path, name)[name]
        last = records(Path(name))[-1]
        assert known == pytest.approx({key: last[f"test_{key}"] for key in known})
    assert found[detectors[1]]["mask_ap"] >= 0
    last = records(Path(detectors[0]))[-1]
    assert found[f"{detectors[0]}#ema"]["box_ap"] == pytest.approx(last["test_ema_box_ap"])


def test_a_saved_detector_is_evaluated_on_the_data_of_the_flags(
    tmp_path: Path, typed: Typed, detectors: list[str], coco: Path
) -> None:
    folder = save_dense(load_dense(detectors[0]), tmp_path / "saved")
    words = (
        "--dataset",
        "coco",
        "--data_path",
        str(coco),
        "--short",
        "64",
        "--long",
        "96",
        "--batch_size",
        "4",
    )
    found = scores(typed, tmp_path, str(folder), *words)
    assert found[str(folder)] == pytest.approx(scores(typed, tmp_path, detectors[0])[detectors[0]])


def test_evaluate_refuses_what_does_not_go_together(
    typed: Typed, detectors: list[str], segmenter: str
) -> None:
    first = detectors[0]
    for words, named in {
        ("--metrics", "knn"): "--metrics", ("--against", first): "--against", ("--real",): "--real",
        ("--subset", "imagenet-a"): "--subset", ("--crop_pct", "1"): "--crop_pct",
        ("vit_tiny_patch16_224",): "vit_tiny_patch16_224", (segmenter,): segmenter,
        ("--dataset", "digits"): "digits",
    }.items():  # fmt: skip
        assert named in typed("evaluate", first, *words, *HERE, code=2).err
    assert "--short" in typed("evaluate", f"{first}#last", "vit_tiny_patch16_224", "--short", 64, code=2).err


def test_other_classes_are_refused(tmp_path: Path, typed: Typed, detectors: list[str], coco: Path) -> None:
    model = load_dense(detectors[0])
    model.settings["class_names"] = ["coin", "saucer", "dahlia"]
    folder = save_dense(model, tmp_path / "saved")
    assert "dahlia" in typed("evaluate", folder, "--dataset", "coco", "--data_path", coco, *HERE, code=2).err
