"""`graftvit data SOURCE`, as typed, and the commands of docs/data.md on small stand-ins of the same layout."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.cli import main
from graftvit.transfer.data import loading
from graftvit.transfer.data.augment import eval_transform
from graftvit.transfer.data.labels import subset_classes
from graftvit.transfer.data.survey import for_the_eye
from PIL import ExifTags, Image
from support.files.data_sets import (
    encoded,
    image,
    write_classes,
    write_fashion,
    write_images,
    write_parquet,
    write_shards,
    write_tar,
)
from support.models.saved import save_model
from support.runs.typed import Typed
from timm.data import dataset_factory

SMALL = ["--img_size", "32", "--images", "8"]


def run(typed: Typed, *words: str) -> str:
    return typed("data", *words).out


def numbers(typed: Typed, tmp_path: Path, *words: str) -> dict[str, Any]:
    run(typed, *words, "--json", str(tmp_path / "found.json"))
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_digits_are_counted_by_class_and_drawn(tmp_path: Path, typed: Typed) -> None:
    picture = tmp_path / "look.png"
    text = run(typed, "digits", "--recipe", "digits_distill", "--images", "5", "--out", str(picture))
    assert "train        1,297       10           126" in text
    assert "modes L 1,297" in text
    assert str(picture) in text
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert run(typed, "--dataset", "digits").splitlines()[:3] == text.splitlines()[:3]


def test_a_folder_is_looked_into(tmp_path: Path, typed: Typed) -> None:
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=3)
    Image.new("CMYK", (30, 6)).save(root / "train" / "ant" / "wide.jpg")
    (root / "train" / "bee" / "text.png").write_text("no image")
    cut = (root / "train" / "bee" / "100.png").read_bytes()
    (root / "train" / "bee" / "100.png").write_bytes(cut[: len(cut) // 2])
    train = numbers(typed, tmp_path, str(root))["splits"]["train"]
    assert (train["images"], train["images_by_label"], train["classes"]) == (8, [4, 4], {"ant": 0, "bee": 1})
    assert train["width"] == {"min": 10, "median": 10, "max": 30}
    assert train["height"] == {"min": 6, "median": 10, "max": 10}
    assert (train["formats"], train["modes"]) == ({"PNG": 6, "JPEG": 1}, {"RGB": 6, "CMYK": 1})
    assert [Path(each["path"]).name for each in train["unreadable_files"]] == ["text.png"]
    whole = numbers(typed, tmp_path, str(root), "--decode")["splits"]["train"]
    assert whole["unreadable"] == 2
    part = numbers(typed, tmp_path, str(root), "--limit", "4")["splits"]["train"]
    assert (part["images"], part["looked_at"]) == (8, 4)


@pytest.mark.parametrize("decode", [False, True])
def test_a_split_without_a_readable_image_is_an_error(decode: bool, tmp_path: Path, typed: Typed) -> None:
    """The command ended with 0, as if all were well."""
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=2)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2] if decode else b"no image")
    shown = typed("data", root, *(["--decode"] if decode else []), code=2)
    assert "validation" in shown.out
    assert "none of the 4 images of validation that were opened can be read" in shown.err


def test_a_damaged_file_of_one_split_is_an_error_that_names_it(tmp_path: Path, typed: Typed) -> None:
    """The command said that there is no such split, and ended with 0."""
    raw = write_fashion(tmp_path / "FashionMNIST" / "raw")
    (raw / "train-images-idx3-ubyte").write_bytes(b"cut")
    said = typed("data", "torch/fashion_mnist", "--data_path", tmp_path, code=2).err
    assert f"{raw / 'train-images-idx3-ubyte'} is missing or damaged: remove it" in said
    root = write_shards(tmp_path / "shards")
    next(root.glob("validation-*.tar")).write_bytes(b"x" * 600)
    assert "cannot be read" in typed("data", "wds/shards", "--data_path", root, code=2).err


def test_images_that_are_to_be_turned_are_counted(tmp_path: Path, typed: Typed) -> None:
    root = write_classes(tmp_path / "set", ["ant", "bee"], count=3)
    assert "orientation" not in run(typed, str(root))
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (30, 6)).save(root / "train" / "ant" / f"{orientation}.jpg", exif=exif)
    assert numbers(typed, tmp_path, str(root))["splits"]["train"]["turned"] == 1
    assert "1 with an EXIF orientation, which is ignored" in run(typed, str(root))


def test_labels_that_differ_are_told_loudly(tmp_path: Path, typed: Typed) -> None:
    root = write_classes(tmp_path / "set", ["ant", "cat"], ["train"])
    write_classes(root, ["ant", "bee", "cat"], ["val"])
    text = run(typed, str(root))
    assert "WARNING  only validation has class bee: training and evaluation refuse it" in text
    same = run(typed, str(write_classes(tmp_path / "same", ["ant", "cat"])))
    assert "WARNING" not in same
    root = write_classes(tmp_path / "other", ["ant", "bee", "cat"], ["train"])
    write_classes(root, ["ant", "cat"], ["val"])
    assert "WARNING  validation has no image of class bee" in run(typed, str(root))


def test_a_folder_without_classes_and_one_without_splits(tmp_path: Path, typed: Typed) -> None:
    write_images(tmp_path / "flat", 4)
    picture = tmp_path / "look.png"
    found = numbers(typed, tmp_path, str(tmp_path / "flat"), *SMALL, "--mixup", "0.8", "--out", str(picture))
    flat = found["splits"]["all"]
    assert list(found["splits"]) == ["all"]
    assert (flat["classes"], flat["unlabeled"], flat["images_by_label"]) == (None, 4, [])
    assert picture.stat().st_size > 1000
    assert "no classes" in run(typed, str(tmp_path / "flat"))
    write_images(tmp_path / "split" / "train", 4)
    assert "no split validation: " in run(typed, str(tmp_path / "split"))


def test_shards_are_looked_into_as_far_as_asked(tmp_path: Path, typed: Typed) -> None:
    root = write_shards(tmp_path / "shards")
    words = ["wds/shards", "--data_path", str(root), "--num_classes", "2", "--limit", "6"]
    picture = tmp_path / "look.png"
    train = numbers(typed, tmp_path, *words, *SMALL, "--mixup", "0.8", "--out", str(picture))["splits"][
        "train"
    ]
    assert (train["images"], train["looked_at"], train["streamed"]) == (8, 4, False)
    assert sum(train["images_by_label"]) == 4
    assert picture.stat().st_size > 1000


def test_shards_that_are_all_missing_are_an_error(tmp_path: Path, typed: Typed) -> None:
    words = [
        "wds/shards",
        "--data_path",
        tmp_path,
        "--num_classes",
        "2",
        "--train_split",
        "s-{0000..0001}.tar|8",
    ]
    assert "s-0000.tar does not exist" in typed("data", *words, code=2).err


def test_indexes_of_shards_are_made_ahead(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_shards(tmp_path / "shards")
    words = ["data", "index", "wds/shards", "--data_path", root, "--val_split", "none", "--beside"]
    for written in (2, 0):
        assert typed(*words).out == f"train: 8 samples in 2 shards, indexes written: {written} of 2\n"
    assert sorted(path.name for path in root.glob("*.npz")) == ["train-0000.tar.npz", "train-0001.tar.npz"]
    other = typed("data", "index", "wds/shards", "--data_path", root, "--val_split", "test").out
    assert other.startswith("train: 8 samples in 2 shards, indexes written: 0 of 2\nleft out: ")
    assert "names no shards of split 'test', only of train, validation" in other
    (root / "train-0001.tar").write_bytes(b"x" * 600)
    assert "train-0001.tar cannot be read" in typed(*words, code=2).err
    assert "has no shards" in typed("data", "index", root, code=2).err


def test_a_hub_set_is_looked_into(tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
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
    train = numbers(typed, tmp_path, *words)["splits"]["train"]
    assert (train["classes"], train["images_by_label"], train["formats"]) == (
        {"ant": 0, "bee": 1},
        [3, 3],
        {"PNG": 6},
    )


def test_a_long_look_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "TOLD_EVERY", 0.0)
    write_images(tmp_path / "flat", 3)
    assert main(["data", str(tmp_path / "flat")]) == 0
    assert "images of all: 67 %, about" in caplog.text


def test_what_the_eye_sees_is_what_the_model_sees() -> None:
    spec = Preprocessing((3, 12, 12), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = np.random.RandomState(0).randint(0, 256, (12, 12, 3), dtype=np.uint8)
    seen = for_the_eye(eval_transform(spec)(Image.fromarray(pixels))[None], spec)
    assert np.allclose(seen[0], pixels / 255, atol=1e-6)
    grey = Preprocessing((1, 2, 2), (0.0,), (1.0,))
    assert for_the_eye(torch.ones(1, 1, 2, 2), grey).shape == (1, 2, 2, 3)


PAGE = Path(__file__).parents[2] / "docs" / "data.md"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("graftvit ")
]
MODEL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 1000}
CATEGORIES = [f"{place:05d}_Plantae_A_B_C_D_E_{name}" for place, name in enumerate(("alba", "nigra"))]


class Cifar:
    """As torchvision's: images by index, with names of classes and labels."""

    classes = ("a", "b")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        self.targets = [0, 1] * (4 if train else 2)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return image(index, 32), self.targets[index]


def wordnet_ids() -> list[str]:
    return (importlib.resources.files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split()


def fill(root: Path, names: Sequence[str], file: str = "0.jpg") -> None:
    """One small image in each of many folders."""
    content = encoded(0, "JPEG", side=4)
    for number, name in enumerate(names, start=1):
        (root / name).mkdir(parents=True)
        (root / name / file.format(number)).write_bytes(content)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    ids = wordnet_ids()
    write_classes(root / "flowers", ["daisy", "rose", "tulip"])
    write_images(root / "photos", 4)
    write_tar(root / "flowers.tar", {"daisy/0.png": encoded(0), "rose/0.png": encoded(1)})
    fill(root / "imagenet" / "train", ids)
    fill(root / "imagenet" / "val", ids[:40], "ILSVRC2012_val_{:08d}.JPEG")
    for name in ("imagenet-a", "imagenet-r"):
        fill(root / name, [ids[label] for label in subset_classes(name)])
    fill(root / "sketch", ids)
    fill(root / "imagenetv2-matched-frequency-format-val", [str(label) for label in range(1000)])
    write_classes(root / "inat2021", CATEGORIES)
    write_classes(root / "inat", CATEGORIES, ["2021_train", "2021_valid"])
    write_shards(root / "shards")
    return root


def words_of(command: str, data: Path, tmp_path: Path) -> list[str]:
    """The command on the stand-ins, with images that are small and no loader processes."""
    command = command.replace("/data/cache", str(tmp_path / "cache")).replace("/data/", f"{data}/")
    command = command.replace("hfds/uoft-cs/cifar100", f"hfds/{tmp_path / 'cifar100'}")
    words = shlex.split(command)[1:]
    small = ["--images", "4"] if "--out" in words else []
    if "--recipe" in words and not words[words.index("--recipe") + 1].startswith("digits"):
        small += ["--img_size", "32"]
    return [*words, *small, "--workers", "0"]


def test_the_page_has_a_command_for_each_kind() -> None:
    text = "\n".join(COMMANDS)
    of_imagenet = ("imagenet-100", "imagenet-a", "imagenet-r", "sketch", "v2", "--real")
    kinds = ("hfds/", "wds/", "tfds/", "torch/", *of_imagenet, "inat")
    assert all(kind in text for kind in kinds)
    assert len(PAGE.read_text().splitlines()) < 180


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, name, Cifar)
    if "hfds/" in command:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        coarse = {"coarse_label": (datasets.ClassLabel(names=["a", "b"]), [0, 1] * 3)}
        write_parquet(tmp_path / "cifar100", coarse, {"train": "train", "test": "test"}, image_column="img")
        if not (data / "parquet").exists():
            write_parquet(data / "parquet", {"label": coarse["coarse_label"]})
    if command.startswith("graftvit evaluate"):
        model = timm.create_model("vit_tiny_patch16_224", **MODEL)
        described = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 16, 16)}
        save_model(tmp_path / "runs" / "distill", model, "vit_tiny_patch16_224", MODEL, **described)
    words = words_of(command, data, tmp_path)
    if "tfds/" in command and importlib.util.find_spec("tensorflow_datasets") is None:
        assert "pip install tensorflow_datasets" in typed(*words, code=2).err
        return
    text = typed(*words).out
    assert "WARNING" not in text.replace("WARNING  validation has no image of", "")
    assert ("| runs/distill |" if words[0] == "evaluate" else "labels of") in text
    assert "--out" not in words or (tmp_path / "look.png").stat().st_size > 1000
