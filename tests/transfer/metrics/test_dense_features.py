"""Patches of a frozen backbone, classified by neighbors and by a probe, against loops over pixels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import graftvit
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.metrics.dense_features import PatchProbe
from PIL import Image
from support.runs.dense_runs import small_coco
from support.runs.launched import clean
from support.runs.typed import Typed

SIZE = (32, 48)
COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes, of colored quarters; some pixels have no label."""
    folder, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count in (("training", 5), ("validation", 3)):
        for place in ("images", "annotations"):
            (folder / place / split).mkdir(parents=True)
        for number in range(count):
            height, width = (int(side) for side in random.integers(40, 80, 2))
            labels = np.kron(random.integers(0, 3, (2, 2)), np.ones((height // 2, width // 2), int))
            pixels = np.array(COLORS)[labels] + random.integers(-20, 20, (*labels.shape, 3))
            labels[:4] = -1
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / f"{number}.png")
            Image.fromarray((labels + 1).astype(np.uint8)).save(
                folder / "annotations" / split / f"{number}.png"
            )
    return folder


def backbone() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=0).eval()


def data(folder: Path) -> DataConfig:
    return DataConfig(dataset="ade20k", data_path=str(folder), num_classes=3, batch_size=2, workers=0)


def scored(model: Any, folder: Path, *wanted: str) -> dict[str, float]:
    return PatchProbe(model, Preprocessing.of(model), data(folder), Accelerator(cpu=True)).score(wanted)


def read(folder: Path, split: str, model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each image as the model takes it, (1, 3, H, W), and the labels of its pixels (h, w); 255 has no class."""
    found = []
    spec = Preprocessing.of(model)
    mean, std = (torch.tensor(each)[:, None, None] for each in (spec.mean, spec.std))
    for path in sorted((folder / "images" / split).iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        resized = F.interpolate(pixels[None].float(), SIZE, mode="bilinear", antialias=True)[0].round() / 255
        labels = torch.from_numpy(
            np.asarray(Image.open(folder / "annotations" / split / path.name)).astype(int)
        )
        found.append((((resized - mean) / std)[None], (labels - 1) % 256))
    return found


def neighbors_by_hand(model: Any, folder: Path, layer: int) -> float:
    """Mean IoU of three classes by loops over patches and pixels."""
    rows, classes = [], []
    for image, labels in read(folder, "training", model):
        (each,) = model.forward_intermediates(image, indices=[layer], norm=True, intermediates_only=True)
        for y in range(each.shape[2]):
            for x in range(each.shape[3]):
                middle = labels[int((y + 0.5) * labels.shape[0] / each.shape[2]),
                                int((x + 0.5) * labels.shape[1] / each.shape[3])]  # fmt: skip
                if middle != 255:
                    rows.append(F.normalize(each[0, :, y, x], dim=0))
                    classes.append(int(middle))
    hits, unions = [0] * 3, [0] * 3
    for image, labels in read(folder, "validation", model):
        (each,) = model.forward_intermediates(image, indices=[layer], norm=True, intermediates_only=True)
        votes = torch.zeros(3, *each.shape[2:])
        for y in range(each.shape[2]):
            for x in range(each.shape[3]):
                near = (torch.stack(rows) @ F.normalize(each[0, :, y, x], dim=0)).topk(20)
                for value, place in zip(*near, strict=True):
                    votes[classes[int(place)], y, x] += (value / 0.07).exp()
        guess = F.interpolate(votes[None], labels.shape, mode="bilinear")[0].argmax(0)
        for number in range(3):
            true, told = labels == number, (guess == number) & (labels != 255)
            hits[number] += int((true & told).sum())
            unions[number] += int((true | told).sum())
    return float(np.mean([hit / union for hit, union in zip(hits, unions, strict=True)]))


@torch.no_grad()
def test_neighbors_are_those_of_loops(images: Path) -> None:
    model = backbone()
    found = scored(model, images, "seg_knn")
    assert found.keys() == {"seg_knn_miou", "seg_knn_miou_layer00", "seg_knn_miou_layer01", "samples"}
    assert found["samples"] == 3
    assert found["seg_knn_miou"] == found["seg_knn_miou_layer01"]
    for layer in range(2):
        assert found[f"seg_knn_miou_layer{layer:02d}"] == pytest.approx(
            neighbors_by_hand(model, images, layer), abs=0.01
        )


def test_a_probe_reads_colors(images: Path) -> None:
    found = scored(backbone(), images, "seg_probe")
    assert found.keys() == {"seg_probe_miou", "samples"}
    assert found["seg_probe_miou"] > 0.7


@pytest.mark.parametrize("name", ["pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_stages_of_a_pyramid_are_its_layers(images: Path, name: str) -> None:
    size = {"img_size": 64} if "swin" in name else {}
    found = scored(timm.create_model(name, num_classes=0, **size).eval(), images, "seg_knn")
    assert {f"seg_knn_miou_layer{stage:02d}" for stage in range(4)} < found.keys()


def test_what_has_no_patches_or_no_pixels_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        PatchProbe(torch.nn.Identity(), Preprocessing.of(backbone()), data(images), Accelerator(cpu=True))
    boxes = DataConfig(dataset="coco", data_path=str(small_coco(tmp_path)))
    with pytest.raises(ConfigError):
        PatchProbe(backbone(), Preprocessing.of(backbone()), boxes, Accelerator(cpu=True))


WORDS = (
    "--dataset",
    "ade20k",
    "--num_classes",
    "3",
    "--batch_size",
    "2",
    "--workers",
    "0",
    "--device",
    "cpu",
)


def test_a_converted_student_is_measured_beside_its_teacher(
    images: Path, tmp_path: Path, typed: Typed
) -> None:
    teacher = graftvit.save(backbone(), tmp_path / "teacher")
    student = graftvit.save(graftvit.convert(backbone(), "*: linear"), tmp_path / "student")
    words = ("evaluate", teacher, student, "--data_path", images, *WORDS, "--metrics")
    told = typed(*words, "seg_knn,seg_probe", "--json", tmp_path / "out.json").out
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {str(teacher), str(student)}
    assert found[str(teacher)] == {
        name: pytest.approx(value)
        for name, value in scored(backbone(), images, "seg_knn", "seg_probe").items()
    }
    assert "kNN mIoU" in told
    assert "by layer" in told
    assert "seg_knn" in typed(*words, "seg_knn,knn", code=2).err
    fewer = typed(*words, "seg_knn", "--train_samples", "2").out
    assert fewer != told


@pytest.mark.slow
def test_processes_give_the_numbers_of_one(images: Path, tmp_path: Path, typed: Typed) -> None:
    teacher = graftvit.save(backbone(), tmp_path / "teacher")
    words = ["evaluate", str(teacher), "--data_path", str(images), *WORDS]
    words += ["--metrics", "seg_knn,seg_probe", "--json"]
    typed(*words, tmp_path / "1.json")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "graftvit.launch"]
    subprocess.run([sys.executable, *start, *words, str(tmp_path / "2.json")], env=clean(), check=True)
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one == two
