"""A notebook of calls on detectors and segmenters: they are objects like others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.models import plan_of
from graftvit.models.dense.dense_model import DenseModel, create_dense
from graftvit.models.errors import ConfigError, DataError, GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.metrics.dense_scores import BoxScores
from PIL import Image
from support.runs.dense_runs import run, small_ade20k, small_coco
from support.runs.engine_runs import records

VIT: dict[str, Any] = {"dynamic_img_size": True, "depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, coco: Path) -> Any:
    return graftvit.train(run(tmp_path_factory.mktemp("runs") / "run", coco))


def detector(kind: Any = "retinanet") -> DenseModel:
    torch.manual_seed(0)
    body = timm.create_model("vit_tiny_patch16_224", **VIT)
    return create_dense(kind, body, 3, width=16, class_names=("coin", "dahlia", "saucer")).eval()


def shown() -> list[torch.Tensor]:
    return [torch.rand(3, 64, 96), torch.rand(3, 90, 60)]


def same(one: Any, other: Any, images: list[torch.Tensor]) -> bool:
    with torch.no_grad():
        pairs = zip(one(images), other(images), strict=True)
    return all(torch.equal(mine[key], theirs[key]) for mine, theirs in pairs for key in mine)


def test_a_run_is_loaded_measured_and_saved_as_a_detector(tmp_path: Path, coco: Path, result: Any) -> None:
    folder = result.output_dir
    model: Any = graftvit.load(folder)
    assert isinstance(model, DenseModel)
    assert not model.training
    saved = graftvit.save(model, tmp_path / "saved")
    assert (saved / "detector.json").is_file()
    for other in (
        graftvit.load(saved),
        result.to_model(),
        graftvit.load(graftvit.save(folder, tmp_path / "run")),
    ):
        assert same(model, other, shown())
    assert isinstance(graftvit.as_model(result), type(model.backbone.body))
    best: Any = graftvit.load(f"{folder}#best")
    last: Any = graftvit.load(folder / "checkpoints" / "last.safetensors")
    assert same(last, model, shown())
    average: Any = graftvit.load(f"{folder}#ema")
    told = [each for each in records(folder) if "test_ema_box_ap" in each]
    chosen = max(told, key=lambda each: float(each["test_ema_box_ap"]))
    if chosen is told[-1]:
        assert same(best, average, shown())
    with pytest.raises(ConfigError):
        graftvit.load(folder, img_size=64)
    half = graftvit.load(graftvit.save(model, tmp_path / "half", dtype=torch.bfloat16))
    assert all(torch.equal(value.bfloat16().float(), half.state_dict()[name].float())
               for name, value in model.state_dict().items())  # fmt: skip
    data = DataConfig(dataset="coco", data_path=str(coco), batch_size=4, workers=0)
    scores: Any = graftvit.evaluate({"whole": model, "best": f"{folder}#best"}, data)
    assert scores.keys() == {"whole", "best"}
    assert 0 <= scores["whole"]["box_ap"] <= 1
    assert scores["whole"] == graftvit.evaluate(result, data) == graftvit.evaluate(folder, coco)


def test_the_backbone_of_a_state_is_a_plain_model(tmp_path: Path, coco: Path) -> None:
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "img_size": 64}
    student = {"model": "vit_tiny_patch16_224", "model_args": arguments, "drop_path": 0.0}
    folder = graftvit.train(run(tmp_path / "run", coco, student=student, optim={"epochs": 1})).output_dir
    for source in (f"{folder}#best", folder / "checkpoints" / "last.safetensors", folder):
        loaded = graftvit.load_pretrained(source)
        assert loaded.model(torch.rand(1, 3, 64, 64)).shape == (1, 24)
        assert isinstance(graftvit.load(source), DenseModel)


def test_batches_of_images_and_targets_are_scored() -> None:
    model, images = detector(), shown()
    model.head.score_thresh = 0.0
    with torch.no_grad():
        found = model(images)
    targets = [{"boxes": each["boxes"][:1], "labels": each["labels"][:1]} for each in found]
    scores = graftvit.evaluate(model, [(images, targets)])
    by_hand = BoxScores(3, masks=False)
    numbered = [{**each, "image_id": place, "original_size": (90, 96)} for place, each in enumerate(targets)]
    by_hand.add(found, numbered)
    assert scores == by_hand.result(lambda part: [part])
    assert scores["box_ap50"] > 0
    with pytest.raises(DataError):
        graftvit.evaluate(model, [(images, targets[:1])])
    with pytest.raises(DataError):
        graftvit.evaluate(model, [(images, [{"labels": torch.tensor([0])}] * 2)])
    with pytest.raises(DataError):
        graftvit.evaluate(model, [(images, [{**each, "labels": each["labels"] + 3} for each in targets])])
    with pytest.raises(ConfigError):
        graftvit.evaluate({"a": model, "b": timm.create_model("vit_tiny_patch16_224", **VIT)}, [])
    segmenter = detector("semantic_fpn")
    with torch.no_grad():
        labels = [{"labels": each["labels"]} for each in segmenter(images)]
    assert graftvit.evaluate(segmenter, [(images, labels)])["miou"] == 1
    assert graftvit.evaluate(segmenter.train(), [(images, labels)])["pixel_accuracy"] == 1
    assert segmenter.training


def test_a_folder_of_labeled_pixels_is_scored(tmp_path: Path) -> None:
    body = timm.create_model("vit_tiny_patch16_224", **VIT)
    model = create_dense("semantic_fpn", body, 150, width=16, short=64, long=96)
    assert 0 <= graftvit.evaluate(model, small_ade20k(tmp_path))["miou"] <= 1
    with pytest.raises(DataError):
        graftvit.evaluate(detector("semantic_fpn"), tmp_path)


def test_a_converted_detector_keeps_neck_and_head(result: Any) -> None:
    model = detector()
    cheap: Any = graftvit.convert(model, "*: linear")
    assert isinstance(cheap, DenseModel)
    assert plan_of(cheap.backbone.body) == "*: linear"
    assert plan_of(model.backbone.body) is None
    before = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    assert all(torch.equal(value, cheap.state_dict()[name]) for name, value in before.items())
    assert not same(model, cheap, shown()) or not len(cheap(shown())[0]["boxes"])
    kept: Any = graftvit.convert(result, "*: keep")
    assert same(kept, graftvit.load(result.output_dir), shown())
    assert isinstance(graftvit.convert(str(result.output_dir), "stage3: linear"), DenseModel)


def test_a_converted_detector_is_saved(tmp_path: Path) -> None:
    cheap: Any = graftvit.convert(detector(), "*: linear")
    assert same(cheap, graftvit.load(graftvit.save(cheap, tmp_path / "cheap")), shown())


def test_teachers_and_students_may_be_detectors(tmp_path: Path) -> None:
    teacher, student = detector(), graftvit.convert(detector(), "*: linear")
    images = torch.randn(2, 3, 64, 96)
    dual = graftvit.DualViT(teacher, student, method="block_output")
    assert dual.student is student.backbone.body  # type: ignore[union-attr]
    with dual.teaching(images, [(64, 96), (50, 60)]) as lesson:
        student.backbone(images)  # type: ignore[operator,union-attr]
    lesson.loss.backward()
    assert torch.isfinite(lesson.loss)
    with pytest.raises(GraftError, match="detector"):
        dual.save(tmp_path / "no")
    alignment = graftvit.Alignment(teacher, student)
    assert all(torch.isfinite(each) for each in alignment(images).values())
    assert graftvit.attention_maps(teacher, images, [0])[0].shape[1] == 3
    assert graftvit.compare_models(teacher, student) is not None


def test_what_is_found_is_drawn(tmp_path: Path, result: Any, coco: Path) -> None:
    files = sorted((coco / "validation").glob("*.png"))[:2]
    seen = graftvit.visualize(result.to_model(), files, tmp_path / "seen")
    assert seen.page is not None
    assert len(seen.figures) == 2
    assert len(list((tmp_path / "seen").glob("*.png"))) == 2
    assert "<img" in seen._repr_html_()
    for model in (detector(), detector("semantic_fpn")):
        assert len(graftvit.visualize(model, torch.rand(2, 3, 64, 96)).figures) == 2
        assert len(graftvit.visualize(model, Image.open(files[0])).figures) == 1
    with pytest.raises(ConfigError):
        graftvit.visualize(detector(), files, layers=[0])


def test_a_detector_is_pushed_by_no_function() -> None:
    with pytest.raises(GraftError, match="detector"):
        graftvit.push(detector(), "me/detector")
