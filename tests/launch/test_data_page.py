"""The commands of docs/data.md, on small stand-ins of the same layout."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.transfer.data.labels import subset_classes
from support.files.data_sets import (
    encoded,
    image,
    write_classes,
    write_images,
    write_parquet,
    write_shards,
    write_tar,
)
from timm.data import dataset_factory

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("graftvit ")
]
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 1000}
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


def described() -> dict[str, Any]:
    """How the stand-in of a run's student is written."""
    return {
        "architecture": "vit_tiny_patch16_224",
        "model_args": SMALL,
        "preprocessing": Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3),
    }


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
    kinds = (
        "hfds/",
        "wds/",
        "tfds/",
        "torch/",
        "imagenet-100",
        "imagenet-a",
        "imagenet-r",
        "sketch",
        "v2",
        "--real",
        "inat",
    )
    assert all(kind in text for kind in kinds)
    assert len(PAGE.read_text().splitlines()) < 160


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(
    command: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    if "wds/" in command:
        pytest.importorskip("webdataset")
    if command.startswith("graftvit evaluate"):
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        write_student(model, tmp_path / "runs" / "distill", **described())
    words = words_of(command, data, tmp_path)
    if "tfds/" in command and importlib.util.find_spec("tensorflow_datasets") is None:
        assert main(words) == 2
        assert "pip install tensorflow_datasets" in capsys.readouterr().err
        return
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "WARNING" not in text.replace("WARNING  validation has no image of", "")
    assert ("| runs/distill |" if words[0] == "evaluate" else "labels of") in text
    assert "--out" not in words or (tmp_path / "look.png").stat().st_size > 1000
