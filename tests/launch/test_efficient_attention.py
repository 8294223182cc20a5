"""`efficient_attention_cifar10` runs as its header says, on a stand-in of CIFAR-10 and on one of ImageNet-100."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.launch.load_config import recipe_text
from support.files.data_sets import image, write_images
from timm.data import dataset_factory

SHORT = ["--max_steps", "1", "--warmup_epochs", "0", "--batch_size", "2", "--workers", "0", "--device", "cpu"]
SHORT += ["--trackers", "none", "--no-progress", "--student.model_args.depth=2"]
LINES = recipe_text("efficient_attention_cifar10").splitlines()
HEADER = " ".join(line.lstrip("# ") for line in LINES if line.startswith("#"))


class Cifar:
    """As torchvision's."""

    classes = tuple("abcdefghij")
    targets = tuple(range(10))

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert (root, download) == ("data", True)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return image(index, 32), index


@pytest.mark.parametrize("plan", ["softmax", "linformer", "performer", "nystrom", "hybrid"])
def test_on_cifar(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "graftvit train efficient_attention_cifar10 --plan '*: performer'" in HEADER
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar10", Cifar)
    assert main(["train", "efficient_attention_cifar10", "--plan", f"*: {plan}", *SHORT]) == 0
    assert (tmp_path / "runs" / "efficient_attention_cifar10" / "student").is_dir()


def test_on_a_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in range(12):  # more than CIFAR-10 has
            write_images(tmp_path / "set" / split / f"class{name}", 1)
    words = (
        HEADER.split("layout of ImageNet-100: ")[1]
        .split(". There")[0]
        .replace("FOLDER", str(tmp_path / "set"))
    )
    output = ["--output_dir", str(tmp_path / "run")]
    assert main(["train", "efficient_attention_cifar10", *shlex.split(words), *SHORT, *output]) == 0
