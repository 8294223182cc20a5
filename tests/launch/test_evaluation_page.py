"""The commands of docs/evaluation.md run as they stand there, on small models and small folders."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from PIL import Image
from scipy.stats import binomtest
from support.files.image_folders import class_folder, flat_folder, write_images
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, tiny_vit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
SMALL = ["--device", "cpu", "--workers", "0"]
SHORT = [
    *SMALL,
    "--max_steps",
    "2",
    "--batch_size",
    "8",
    "--aa",
    "none",
    "--warmup_epochs",
    "0",
    "--trackers",
    "none",
]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def save(folder: Path, num_classes: int) -> str:
    torch.manual_seed(num_classes)
    arguments = {**ARGUMENTS, "num_classes": num_classes}
    how = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    write_student(
        tiny_vit(num_classes=num_classes),
        folder,
        architecture=ARCHITECTURE,
        model_args=arguments,
        preprocessing=how,
    )
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the runs that the page speaks of."""
    root = tmp_path_factory.mktemp("evaluation")
    save(root / "classifier", 1000)
    encoder, two = save(root / "encoder", 0), save(root / "two", 2)
    class_folder(root / "photos")
    flat_folder(root / "pile", validation=5)
    synsets = (resources.files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()
    for synset in synsets:
        write_images(root / "imagenet-a" / synset, 1)
    (root / "imagenet" / "val" / "a").mkdir(parents=True)
    for number in range(1, 6):
        Image.new("L", (9, 9), number).save(
            root / "imagenet" / "val" / "a" / f"ILSVRC2012_val_{number:08d}.png"
        )
    for name, words in {
        "task": ["--mode", "finetune", "--student.model", two, "--data_path", str(root / "photos")],
        "other": ["--mode", "finetune", "--student.model", two, "--data_path", str(root / "photos"), "--seed", "1"],
        "align": [
            "--mode", "align", "--student.model", encoder, "--teacher", encoder, "--plan", "*: linear",
            "--data_path", str(root / "pile"),
        ],
    }.items():  # fmt: skip
        assert main(["train", *words, *SHORT, "--output_dir", str(root / "runs" / name)]) == 0
    return root


def words_of(command: str, place: Path) -> list[str]:
    models = {"vit_base_patch16_224.augreg_in1k": "classifier", "vit_base_patch16_224.mae": "encoder"}
    words = shlex.split(command)[1:]
    fresh = ["--student.model_args", json.dumps(ARGUMENTS)] if "vit_base_patch16_224" in words else []
    words = [f"local-dir:{place / models[word]}" if word in models else word for word in words]
    words = [ARCHITECTURE if word == "vit_base_patch16_224" else word for word in words]
    return [*words, *fresh, *(SHORT if words[0] == "train" else SMALL)]


@pytest.mark.parametrize("command", commands())
def test_each_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(words_of(command, place)) == 0


def measured(place: Path, tmp_path: Path, *words: str) -> dict[str, dict[str, float]]:
    assert main(["evaluate", *words, *SMALL, "--json", str(tmp_path / "x.json")]) == 0
    found: dict[str, dict[str, float]] = json.loads((tmp_path / "x.json").read_text())
    return found


def test_all_metrics_of_a_model_at_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, teacher = str(place / "runs" / "task"), f"local-dir:{place / 'encoder'}"
    found = measured(place, tmp_path, run, "--metrics", "top1,knn,probe,distance", "--against", teacher)[run]
    families = ("relative_error", "cosine", "cka")
    assert set(found) == {
        "top1", "top5", "loss", "knn_top1", "knn_top5", "probe_top1", "probe_top5", "samples", *families,
        *(f"{name}_layer0{layer}" for name in families for layer in (0, 1)),
        *(f"{name}_interval" for name in ("top1", "knn_top1", "probe_top1")),
    }  # fmt: skip
    assert found["samples"] == 12
    assert found["knn_top1"] == found["probe_top1"] == 100, "dark and light images can be told apart"
    table = capsys.readouterr().out
    low, high = binomtest(12, 12).proportion_ci(method="wilson")
    assert found["probe_top1_interval"] == pytest.approx([100 * low, 100 * high])
    heads = (
        "top-1 % [95 % interval]",
        "top-5 %",
        "  loss",
        "kNN top-1 % [95 % interval]",
        "probe top-1 % [95 % interval]",
    )
    assert f"| {' | '.join(heads)} | relative error | cosine |    CKA |" in table
    assert f"100.00 [{100 * low:.1f}, 100.0] |" in table
    assert "by layer:\n\n| layer | relative error | cosine |    CKA |\n" in table
    assert f"| 01    | {found['relative_error_layer01']:14.4f} | {found['cosine_layer01']:6.4f} |" in table


def test_a_run_is_held_against_the_classes_of_the_folder_that_is_given(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own number of classes is that of its own data, and says nothing of another folder."""
    run, model, thousand = tmp_path / "run", f"local-dir:{place / 'classifier'}", tmp_path / "thousand"
    for label in range(1000):
        write_images(thousand / "train" / f"{label:03d}", 1)
    write_images(thousand / "validation" / "007", 12)
    words = ["--student.model", model, "--data_path", str(thousand), "--num_classes", "1000", *SHORT]
    assert main(["train", "--mode", "finetune", *words, "--output_dir", str(run)]) == 0
    assert measured(place, tmp_path, str(run))[str(run)]["samples"] == 12
    variant = [str(run), "--data_path", str(place / "imagenet-a")]
    capsys.readouterr()
    assert main(["evaluate", *variant, *SMALL]) == 2
    assert "add --subset imagenet-a" in capsys.readouterr().err
    alone = [f"local-dir:{run / 'student'}", "--data_path", str(place / "imagenet-a")]
    mine, theirs = (measured(place, tmp_path, *each, "--subset", "imagenet-a") for each in (variant, alone))
    assert list(mine.values()) == list(theirs.values())


def test_a_model_is_at_no_distance_from_itself(place: Path, tmp_path: Path) -> None:
    itself = f"local-dir:{place / 'encoder'}"
    found = measured(place, tmp_path, itself, "--against", itself, "--data_path", str(place / "pile"))[itself]
    assert set(found) == {"relative_error", "cosine", "cka", "samples"} | {
        f"{name}_layer0{layer}" for name in ("relative_error", "cosine", "cka") for layer in (0, 1)
    }
    assert (found["relative_error"], found["cosine"], found["cka"]) == pytest.approx((0, 1, 1), abs=1e-6)
    assert found["samples"] == 5


def test_random_weights_stand_beside_the_distances(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    itself = f"local-dir:{place / 'encoder'}"
    found = measured(place, tmp_path, itself, "--against", itself, "--data_path", str(place / "pile"))
    random = found["random weights"]
    assert set(random) == set(found[itself])
    assert random["relative_error"] > 0.1
    assert random["cka"] < found[itself]["cka"]
    assert f"random weights of {itself}'s architecture" in capsys.readouterr().out


def test_models_without_a_head_are_compared_by_their_neighbors(place: Path, tmp_path: Path) -> None:
    names = [f"local-dir:{place / name}" for name in ("encoder", "runs/align/student")]
    found = measured(place, tmp_path, *names, "--data_path", str(place / "photos"))
    assert list(found) == names, "there is no ensemble of features"
    expected = {"knn_top1", "knn_top1_interval", "knn_top5", "samples"}
    assert all(set(numbers) == expected for numbers in found.values())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{encoder}", "--data_path", "{pile}"], ["the images have no labels", "--against TEACHER"]),
        (["{encoder}", "--data_path", "{pile}", "--metrics", "knn"], ["the images have no labels"]),
        (["{encoder}", "--data_path", "{imagenet-a}"], ["apart from the test images", "'train'"]),
        (["{encoder}", "--data_path", "{photos}", "--val_split", "train"], ["apart from the test images"]),
        (["{classifier}", "--data_path", "{imagenet-a}"], ["200 classes", "1000 logits", "--subset imagenet-a"]),
        (["{classifier}", "--data_path", "{imagenet-a}", "--num_classes", "1000"], ["--subset imagenet-a"]),
        (["{classifier}", "--data_path", "{photos}"], ["2 classes", "1000 logits", "--metrics knn"]),
        (["{encoder}", "--data_path", "{imagenet-a}", "--subset", "imagenet-a"], ["--subset", "without a head"]),
        (["{two}", "--data_path", "{imagenet-a}"], ["200 classes", "2 logits"]),
        (["{two}", "--data_path", "{uneven}", "--metrics", "knn"], ["training split has no images of: gray"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    words: list[str], parts: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "uneven").exists():
        class_folder(place / "uneven")
        write_images(place / "uneven" / "validation" / "gray", 2)
    names: dict[str, Any] = {name: f"local-dir:{place / name}" for name in ("encoder", "classifier", "two")}
    names |= {name: place / name for name in ("pile", "photos", "imagenet-a", "uneven")}
    assert main(["evaluate", *(word.format(**names) for word in words), *SMALL]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in parts), message
