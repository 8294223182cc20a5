"""`graftvit data SOURCE`, as typed: what it finds in a data set, what it warns of, and the picture it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.cli import main
from graftvit.transfer.data import survey as looking
from graftvit.transfer.data.augment import eval_transform
from graftvit.transfer.data.survey import for_the_eye
from PIL import ExifTags, Image
from support.files.data_sets import write_classes, write_images, write_parquet, write_shards

SMALL = ["--img_size", "32", "--images", "8"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) == 0
    return capsys.readouterr().out


def numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, Any]:
    run(capsys, *words, "--json", str(tmp_path / "found.json"))
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_digits_are_counted_by_class_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "look.png"
    text = run(capsys, "digits", "--recipe", "digits_distill", "--images", "5", "--out", str(picture))
    assert "train        1,297       10           126" in text
    assert "modes L 1,297" in text
    assert str(picture) in text
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert run(capsys, "--dataset", "digits").splitlines()[:3] == text.splitlines()[:3]


def test_a_folder_is_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=3)
    Image.new("CMYK", (30, 6)).save(root / "train" / "ant" / "wide.jpg")
    (root / "train" / "bee" / "text.png").write_text("no image")
    cut = (root / "train" / "bee" / "100.png").read_bytes()
    (root / "train" / "bee" / "100.png").write_bytes(cut[: len(cut) // 2])
    train = numbers(capsys, tmp_path, str(root))["splits"]["train"]
    assert (train["images"], train["images_by_label"], train["classes"]) == (8, [4, 4], {"ant": 0, "bee": 1})
    assert train["width"] == {"min": 10, "median": 10, "max": 30}
    assert train["height"] == {"min": 6, "median": 10, "max": 10}
    assert (train["formats"], train["modes"]) == ({"PNG": 6, "JPEG": 1}, {"RGB": 6, "CMYK": 1})
    assert [Path(each["path"]).name for each in train["unreadable_files"]] == ["text.png"]
    whole = numbers(capsys, tmp_path, str(root), "--decode")["splits"]["train"]
    assert whole["unreadable"] == 2
    part = numbers(capsys, tmp_path, str(root), "--limit", "4")["splits"]["train"]
    assert (part["images"], part["looked_at"]) == (8, 4)


@pytest.mark.parametrize("decode", [False, True])
def test_a_split_without_a_readable_image_is_an_error(
    decode: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ended with 0, as if all were well."""
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=2)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2] if decode else b"no image")
    assert main(["data", str(root), *(["--decode"] if decode else [])]) == 2
    shown = capsys.readouterr()
    assert "validation" in shown.out
    assert "none of the 4 images of validation that were opened can be read" in shown.err


def test_images_that_are_to_be_turned_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=3)
    assert "orientation" not in run(capsys, str(root))
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (30, 6)).save(root / "train" / "ant" / f"{orientation}.jpg", exif=exif)
    assert numbers(capsys, tmp_path, str(root))["splits"]["train"]["turned"] == 1
    assert "1 with an EXIF orientation, which is ignored" in run(capsys, str(root))


def test_labels_that_differ_are_told_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_classes(tmp_path / "set", ["ant", "cat"], ["train"])
    write_classes(root, ["ant", "bee", "cat"], ["val"])
    text = run(capsys, str(root))
    assert "WARNING  only validation has class bee: training and evaluation refuse it" in text
    same = run(capsys, str(write_classes(tmp_path / "same", ["ant", "cat"])))
    assert "WARNING" not in same


def test_a_class_without_images_in_a_split_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_classes(tmp_path / "set", ["ant", "bee", "cat"], ["train"])
    write_classes(root, ["ant", "cat"], ["val"])
    text = run(capsys, str(root))
    assert "WARNING  validation has no image of class bee" in text


def test_a_folder_without_classes_and_one_without_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "flat", 4)
    picture = tmp_path / "look.png"
    found = numbers(capsys, tmp_path, str(tmp_path / "flat"), *SMALL, "--mixup", "0.8", "--out", str(picture))
    flat = found["splits"]["all"]
    assert list(found["splits"]) == ["all"]
    assert (flat["classes"], flat["unlabeled"], flat["images_by_label"]) == (None, 4, [])
    assert picture.stat().st_size > 1000
    assert "no classes" in run(capsys, str(tmp_path / "flat"))
    write_images(tmp_path / "split" / "train", 4)
    assert "no split validation: " in run(capsys, str(tmp_path / "split"))


def test_shards_are_looked_into_as_far_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "shards")
    words = ["wds/shards", "--data_path", str(root), "--num_classes", "2", "--limit", "6"]
    picture = tmp_path / "look.png"
    train = numbers(capsys, tmp_path, *words, *SMALL, "--mixup", "0.8", "--out", str(picture))["splits"][
        "train"
    ]
    assert (train["images"], train["looked_at"], train["streamed"]) == (8, 6, True)
    assert sum(train["images_by_label"]) == 6
    assert picture.stat().st_size > 1000


def test_a_hub_set_is_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    animals = {"fine_label": (datasets.ClassLabel(names=["ant", "bee"]), [0, 1] * 3)}
    root = write_parquet(tmp_path / "set", animals, image_column="img")
    words = [
        f"hfds/{root}",
        "--data_path",
        str(tmp_path / "cache"),
        *SMALL,
        "--out",
        str(tmp_path / "look.png"),
    ]
    train = numbers(capsys, tmp_path, *words)["splits"]["train"]
    assert (train["classes"], train["images_by_label"], train["formats"]) == (
        {"ant": 0, "bee": 1},
        [3, 3],
        {"PNG": 6},
    )


def test_a_long_look_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(looking, "INTERVAL_S", 0.0)
    write_images(tmp_path / "flat", 3)
    with caplog.at_level("INFO"):
        assert main(["data", str(tmp_path / "flat")]) == 0
    assert "all: 2 of 3 images, about" in caplog.text


def test_what_the_eye_sees_is_what_the_model_sees() -> None:
    spec = Preprocessing((3, 12, 12), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = np.random.RandomState(0).randint(0, 256, (12, 12, 3), dtype=np.uint8)
    seen = for_the_eye(eval_transform(spec)(Image.fromarray(pixels))[None], spec)
    assert np.allclose(seen[0], pixels / 255, atol=1e-6)
    grey = Preprocessing((1, 2, 2), (0.0,), (1.0,))
    assert for_the_eye(torch.ones(1, 1, 2, 2), grey).shape == (1, 2, 2, 3)


def test_what_cannot_be_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere does not exist" in refusal(capsys, "/nowhere")
    assert "data_path is not set" in refusal(capsys)
    assert "data/flowers does not exist" in refusal(capsys, "data/flowers")
    assert "torch/cifar11" in refusal(capsys, "torch/cifar11", "--data_path", str(tmp_path))
    assert "--images: give a whole number, 1 or more" in refusal(capsys, "digits", "--images", "0")
    assert "--limit: give a whole number, 1 or more" in refusal(capsys, "digits", "--limit", "0")
    assert "its folder does not exist" in refusal(
        capsys, "digits", "--out", str(tmp_path / "no" / "look.png")
    )
