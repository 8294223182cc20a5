"""Classes go by name from the folders to the student's config, and from there to every evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import save
from graftvit.checkpoints.upload import plan_upload
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder, write_images
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS
from support.runs.typed import Typed

NAMES = ("bright", "dark")
"""In the order of folders; the first is brighter than the second."""


def run(root: Path, folder: Path, *words: str) -> dict[str, float]:
    settings = [
        f"data_path={root}", f"output_dir={folder}", f"student.model={ARCHITECTURE}", "mode=scratch",
        *(f"student.model_args.{name}={value}" for name, value in ARGUMENTS.items()),
        "aa=none", "batch_size=8", "warmup_epochs=0", "workers=0", "device=cpu", "trackers=none",
        "progress=false", "blr=0.1", "hflip=0", "smoothing=0",
    ]  # fmt: skip
    length = [] if any(word.startswith("max_steps=") for word in words) else ["epochs=8"]
    return train(load_config(None, [*settings, *length, *words])).metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of two classes, and its accuracy."""
    folder = tmp_path_factory.mktemp("trained")
    root = folder / "set"
    for split, count, seed in (("train", 8, 0), ("validation", 6, 9)):
        write_images(root / split / "bright", count, seed=seed, level=225)
        write_images(root / split / "dark", count, seed=seed + 1, level=30)
    return folder / "run", run(root, folder / "run")["test_top1"]


def others(root: Path, names: dict[str, int], count: int = 6) -> Path:
    """A validation split alone, of classes with a brightness."""
    for place, (name, level) in enumerate(names.items()):
        write_images(root / "validation" / name, count, seed=20 + place, level=level)
    return root


DATA = ("--device", "cpu", "--workers", "0")


def evaluated(typed: Typed, tmp_path: Path, source: str, root: Path, *words: str) -> dict[str, float]:
    typed("evaluate", source, "--data_path", root, *DATA, *words, "--json", tmp_path / "scores.json")
    found: dict[str, float] = json.loads((tmp_path / "scores.json").read_text())[source]
    return found


def refused(typed: Typed, source: str, root: Path) -> str:
    return typed("evaluate", source, "--data_path", root, *DATA, code=2).err.splitlines()[-1]


def renamed(source: Path, folder: Path, names: Any) -> str:
    """A copy of a student whose config says other class names."""
    save(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("label_names", None)
    (folder / "config.json").write_text(
        json.dumps(config | ({} if names is None else {"label_names": names}))
    )
    return str(folder)


def test_what_a_run_leaves_says_its_classes(trained: tuple[Path, float], tmp_path: Path) -> None:
    run_folder, top1 = trained
    assert top1 == 100
    for folder in (run_folder / "student", save(f"{run_folder}#best", tmp_path / "best"),
                   save(run_folder / "checkpoints" / "last.safetensors", tmp_path / "file")):  # fmt: skip
        assert json.loads((folder / "config.json").read_text())["label_names"] == list(NAMES)
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert tuple(plain.pretrained_cfg["label_names"]) == NAMES
        assert load_pretrained(str(folder)).label_names == NAMES
    assert load_pretrained(str(run_folder / "student"), num_classes=0).label_names is None
    stripped = tmp_path / "stripped.safetensors"
    assert (
        main(["checkpoint", "strip", str(run_folder / "checkpoints" / "last.safetensors"), str(stripped)])
        == 0
    )
    assert load_pretrained(str(stripped)).label_names == NAMES
    pushed = plan_upload(run_folder / "student", "someone/student", license="mit", confirm_license=True)
    assert pushed.config["label_names"] == list(NAMES)


@pytest.mark.parametrize("source", ["", "/student", "#best"])
def test_a_validation_set_in_another_order_goes_by_name(
    source: str, trained: tuple[Path, float], tmp_path: Path, typed: Typed
) -> None:
    """The images of one class alone had the number 0, whichever class it was."""
    found = evaluated(typed, tmp_path, f"{trained[0]}{source}", others(tmp_path / "o", {"dark": 30}))
    assert (found["top1"], found["samples"]) == (100, 6)


def test_foreign_classes_are_refused_by_name(
    trained: tuple[Path, float], tmp_path: Path, typed: Typed
) -> None:
    root = others(tmp_path / "o", {"bright": 225, "gloomy": 30})
    message = refused(typed, str(trained[0] / "student"), root)
    assert "classes that the model was not trained for: gloomy" in message
    found = evaluated(typed, tmp_path, renamed(trained[0], tmp_path / "unnamed", None), root)
    assert found["top1"] == 100, "names that nobody knows go by number, as ever"


def test_features_need_no_names(trained: tuple[Path, float], tmp_path: Path, typed: Typed) -> None:
    root = class_folder(tmp_path / "o", ("a", "b"))
    found = evaluated(typed, tmp_path, str(trained[0] / "student"), root, "--metrics", "knn")
    assert found["knn_top1"] == 100


def test_students_in_several_orders_are_evaluated_together(
    trained: tuple[Path, float], tmp_path: Path, typed: Typed
) -> None:
    first = str(trained[0] / "student")
    swapped = renamed(trained[0], tmp_path / "swapped", list(NAMES[::-1]))
    root = str(others(tmp_path / "o", {"bright": 225, "dark": 30}))
    path = tmp_path / "scores.json"
    data = ["--data_path", root, "--device", "cpu", "--workers", "0"]
    typed("evaluate", first, swapped, *data, "--json", path)
    found = json.loads(path.read_text())
    assert found[first]["top1"] == 100
    assert found[swapped]["top1"] == 0, "each of its classes is called as the other"
    other = renamed(trained[0], tmp_path / "other", ["bright", "gloomy"])
    assert "gloomy" in typed("evaluate", first, other, *data, code=2).err.splitlines()[-1]


@pytest.mark.parametrize(
    "names", ["dark", 5, ["bright"], ["a", "a"], [1, 2], {"0": "bright"}, {"x": "a", "1": "b"}]
)
def test_names_that_say_nothing_are_unknown(names: Any, trained: tuple[Path, float], tmp_path: Path) -> None:
    assert load_pretrained(renamed(trained[0], tmp_path / "s", names)).label_names is None


def test_names_by_number_are_read(trained: tuple[Path, float], tmp_path: Path) -> None:
    folder = renamed(trained[0], tmp_path / "s", {"1": "dark", "0": "bright"})
    assert load_pretrained(folder).label_names == NAMES


def test_other_names_at_a_resume_are_refused(tmp_path: Path) -> None:
    """A class folder that was renamed between stop and resume gave its labels to others."""
    root = class_folder(tmp_path / "set", ("ant", "bee", "cat"))
    short = ["batch_size=6", "save_every=1"]
    run(root, tmp_path / "run", *short, "max_steps=4")
    for split in ("train", "validation"):
        (root / split / "ant").rename(root / split / "dog")
    with pytest.raises(Exception, match=r"class 0 .*'ant'.*'bee'") as caught:
        run(root, tmp_path / "run", *short, "max_steps=9")
    assert "\n" not in str(caught.value)
    for split in ("train", "validation"):
        (root / split / "dog").rename(root / split / "ant")
    run(root, tmp_path / "run", *short)


def test_a_run_is_measured_at_the_size_that_is_asked_for(
    trained: tuple[Path, float], tmp_path: Path, typed: Typed
) -> None:
    run_folder, _ = trained
    root, size = others(tmp_path, {"dark": 30, "bright": 225}), ARGUMENTS["patch_size"] * 3
    for source in (run_folder, run_folder / "student"):
        own = evaluated(typed, tmp_path, str(source), root)
        assert evaluated(typed, tmp_path, str(source), root, "--img_size", str(size)) != own
