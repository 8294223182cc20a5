"""What the commands do with detectors and segmenters, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.dense_models import load_dense, save_dense
from graftvit.models.conversion import plan_of
from graftvit.models.dense import Kind
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
    heads: tuple[Kind, ...] = ("retinanet", "mask_rcnn", "fcos")
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
    known = scores(typed, tmp_path, str(folder), *words[:4])
    found = scores(typed, tmp_path, str(folder), *words)
    assert known == found
    assert found[str(folder)] == pytest.approx(scores(typed, tmp_path, detectors[0])[detectors[0]])


def test_evaluate_refuses_what_does_not_go_together(
    typed: Typed, detectors: list[str], segmenter: str
) -> None:
    first = detectors[0]
    for words, named in {
        ("--metrics", "knn"): "--metrics", ("--against", first): "--against", ("--real",): "--real",
        ("--subset", "imagenet-a"): "--subset", ("--crop_pct", "1"): "--crop_pct", ("--img_size", "64"): "--img_size",
        ("vit_tiny_patch16_224",): "vit_tiny_patch16_224", (segmenter,): segmenter,
        ("--dataset", "digits"): "digits",
    }.items():  # fmt: skip
        assert named in typed("evaluate", first, *words, *HERE, code=2).err
    assert first in typed("evaluate", "vit_tiny_patch16_224", first, *HERE, code=2).err
    assert "--short" in typed("evaluate", "vit_tiny_patch16_224", "--short", 64, code=2).err


@pytest.mark.slow
def test_export_writes_the_maps_that_the_head_gets(
    tmp_path: Path, typed: Typed, detectors: list[str]
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, first = tmp_path / "maps.onnx", detectors[0]
    assert "img_size" in typed("export", first, out, code=2).err
    typed("export", first, out, "--img_size", "64,96")
    images, model = torch.randn(2, 3, 64, 96), load_dense(first)
    found = onnxruntime.InferenceSession(str(out)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = model.neck(model.backbone(images))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(torch.from_numpy(ours), theirs, atol=1e-4)
    said = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert said["strides"] == "8,16,32,64,128"
    assert said["classes"] == "3"
    for words in (("--img_size", "60,96"), ("--img_size", "64", "--dynamic", "resolution")):
        typed("export", first, tmp_path / "other.onnx", *words, code=2)


def test_deploy_refuses_what_needs_python_behind_the_graph(
    tmp_path: Path, typed: Typed, detectors: list[str], segmenter: str
) -> None:
    for source in (detectors[0], segmenter):
        error = typed(
            "deploy", source, "--to", "onnx", "--output_dir", tmp_path / "out", *HERE[:2], code=2
        ).err
        assert "`graftvit export`" in error
        assert not (tmp_path / "out").exists()


def test_data_counts_objects_and_crowds(tmp_path: Path, typed: Typed, coco: Path) -> None:
    told = typed("data", "coco", "--data_path", coco, "--json", tmp_path / "data.json").out
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["splits"]["train"]["images"] == 12
    assert found["splits"]["validation"]["objects"].keys() == {"coin", "dahlia", "saucer"}
    assert "coin" in told
    assert "--out" in typed("data", "coco", "--data_path", coco, "--out", tmp_path / "a.png", code=2).err


def test_commands_of_classifiers_say_so(tmp_path: Path, typed: Typed, detectors: list[str]) -> None:
    assert "detector.json" in typed("push", detectors[0], "me/detector", code=2).err
    compare = ("digits_compare", "--dense.head", "retinanet", "--output_dir", tmp_path / "out")
    assert "dense.head=retinanet" in typed("compare", *compare, code=2).err


def test_convert_keeps_neck_and_head(tmp_path: Path, typed: Typed, detectors: list[str], coco: Path) -> None:
    first, out, words = detectors[0], tmp_path / "cheap", ("--plan", "stage3: linear", "--output_dir")
    told = typed("convert", first, *words, out).out
    assert "recover_detector" in told
    assert "--mode align" not in told
    model, made = load_dense(first), load_dense(out)
    assert plan_of(made.backbone.body) == "0-1: keep; 2: linear; 3: keep"
    rest = {name: each for name, each in model.state_dict().items() if not name.startswith("backbone.")}
    assert all(torch.equal(each, made.state_dict()[name]) for name, each in rest.items())
    scores(typed, tmp_path, str(out), "--dataset", "coco", "--data_path", str(coco))
    typed("convert", first, *words, out, "--force", "--weights", "mlp")


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "dense.md"
    names: dict[str, Any] = {}
    for cell in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(cell, names)
    assert torch.isfinite(names["loss"])
    assert [each["boxes"].shape[1] for each in names["found"]] == [4, 4]


@pytest.mark.slow
def test_visualize_draws_what_is_found(
    tmp_path: Path, typed: Typed, detectors: list[str], segmenter: str
) -> None:
    for name, source in enumerate((detectors[1], segmenter)):
        page = typed("visualize", source, "--output_dir", tmp_path / str(name)).out.strip()
        assert page.endswith("index.html")
        assert Path(page).read_text().count("<figure") >= 5
        assert len(list(Path(page).parent.glob("*.png"))) == 5
    refused = typed("visualize", detectors[0], "--query", "cls", "--output_dir", tmp_path / "no", code=2)
    assert "--query" in refused.err


def test_the_backbone_of_a_detector_shows_its_attention(
    tmp_path: Path, typed: Typed, detectors: list[str], coco: Path
) -> None:
    image = coco / "validation" / "000000000010.png"
    typed(
        "visualize",
        f"{detectors[0]}/student",
        image,
        "--img_size",
        "64,96",
        "--output_dir",
        tmp_path / "seen",
    )
    assert (tmp_path / "seen" / "index.html").is_file()


def test_other_classes_are_refused(tmp_path: Path, typed: Typed, detectors: list[str], coco: Path) -> None:
    model = load_dense(detectors[0])
    model.settings["class_names"] = ["coin", "saucer", "dahlia"]
    folder = save_dense(model, tmp_path / "saved")
    assert "dahlia" in typed("evaluate", folder, "--dataset", "coco", "--data_path", coco, *HERE, code=2).err


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_head_that_is_not_there_stops_before_the_first_stage(
    tmp_path: Path, typed: Typed, detectors: list[str], coco: Path, dry: tuple[str, ...]
) -> None:
    words = (
        "recover_detector",
        "--teacher",
        detectors[0],
        "--data_path",
        coco,
        "--output_dir",
        tmp_path / "run",
    )
    assert "dense.source" in typed("train", *words, *HERE, *dry, code=2).err
    assert not (tmp_path / "run").exists()
