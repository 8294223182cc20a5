"""`graftvit evaluate`, as typed, and the commands of docs/evaluation.md as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any, cast

import graftvit
import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.cli import main
from graftvit.launch.evaluation import predictor
from graftvit.launch.load_config import load_config
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.train import train
from PIL import Image
from scipy.stats import binomtest
from support.files.image_folders import class_folder, flat_folder, write_images
from support.models.saved import save_model
from support.runs.dense_runs import small_ade20k
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, tiny_vit
from support.runs.typed import Typed
from timm.models import save_for_hf
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("few_digits")

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 3}
STUDENT = [
    "student.model=vit_tiny_patch16_224",
    *(
        f"student.model_args.{name}={SIZES[name]}"
        for name in ("patch_size", "embed_dim", "depth", "num_heads")
    ),
    "student.img_size=16",
]
RUN = [
    *STUDENT, "dataset=digits", "aa=none", "batch_size=20", "train_samples=40", "epochs=1", "warmup_epochs=0",
    "workers=0", "device=cpu", "trackers=none", "progress=false", "blr=0.02",
]  # fmt: skip


def save(folder: Path, seed: int, mean: float = 0.5, std: float = 0.5, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    arguments = SIZES | {"num_classes": 10} | changes
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            parameter.data *= 20  # attention that is far from uniform
    described = {"mean": (mean,) * 3, "std": (std,) * 3}
    save_model(folder, model, "vit_tiny_patch16_224", arguments, **described)
    return model


def digits(spec: Preprocessing) -> tuple[Tensor, Tensor]:
    loader = create_eval_loader(load_config(None, ["dataset=digits", "workers=0"]).data, spec)
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def scores(typed: Typed, tmp_path: Path, *words: str) -> dict[str, dict[str, float]]:
    path = tmp_path / "scores.json"
    table = typed("evaluate", *words, "--device", "cpu", "--workers", "0", "--json", path).out
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    assert all(f"| {name} " in table for name in found)
    return found


def test_each_and_the_ensemble_are_what_a_plain_loop_gives(tmp_path: Path, typed: Typed) -> None:
    first, second = save(tmp_path / "a", 0), save(tmp_path / "b", 1, mean=0.2, std=0.3)
    names = [f"local-dir:{tmp_path / name}" for name in "ab"]
    found = scores(typed, tmp_path, *names, "--dataset", "digits", "--batch_size", "64")
    half, other = (
        Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9),
        Preprocessing((3, 16, 16), (0.2,) * 3, (0.3,) * 3, crop_pct=0.9),
    )
    images, targets = digits(half)
    with torch.no_grad():
        probabilities = [first(images).softmax(-1), second(digits(other)[0]).softmax(-1)]
    probabilities.append((probabilities[0] + probabilities[1]) / 2)
    for name, each in zip([*names, "ensemble"], probabilities, strict=True):
        top1 = (each.argmax(-1) == targets).double().mean().item() * 100
        loss = -each.gather(1, targets[:, None]).log().mean().item()
        assert found[name]["top1"] == pytest.approx(top1, abs=0.21)
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert found[name]["samples"] == len(targets)


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_a_run_is_evaluated_as_it_evaluated_itself(method: str, tmp_path: Path, typed: Typed) -> None:
    save(tmp_path / "teacher", 3)
    run = tmp_path / method
    overrides = [*RUN, f"teacher=local-dir:{tmp_path / 'teacher'}", f"method={method}", f"output_dir={run}"]
    result = train(load_config(None, overrides))
    found = scores(typed, tmp_path, str(run))[str(run)]
    assert found["top1"] == pytest.approx(result.metrics["test_top1"])
    assert found["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    (tmp_path / "teacher").rename(tmp_path / "gone")
    (run / "student").rename(tmp_path / "moved")
    moved = f"local-dir:{tmp_path / 'moved'}"
    again = scores(typed, tmp_path, moved, "--dataset", "digits", "--batch_size", "20")[moved]
    assert again["top1"] == found["top1"]


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_the_features_of_knn_and_probe_are_named(
    pooling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: Typed
) -> None:
    save(tmp_path / "teacher", 3)
    teacher, run = f"local-dir:{tmp_path / 'teacher'}", tmp_path / "run"
    settings = [f"teacher={teacher}", f"global_pool={pooling}", f"output_dir={run}"]
    train(load_config(None, [*RUN, *settings]))
    capsys.readouterr()
    words = ["--metrics", "knn,probe", "--device", "cpu", "--workers", "0"]
    found = typed("evaluate", run, *words).out
    assert f"kNN and probe of {run}: 24 features of an image, pooled by {pooling}" in found
    warning = f"warning: {run} is pooled by avg and its teacher {teacher} by token"
    assert (warning in found) == (pooling == "avg")
    assert "kNN" not in typed("evaluate", run, "--device", "cpu", "--workers", "0").out


def test_a_teacher_of_any_kind_is_shown_its_own_size(tmp_path: Path, typed: Typed) -> None:
    transformer = save(tmp_path / "vit", 0)
    free = save(tmp_path / "free", 1, img_size=32, dynamic_img_size=True)
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10)
    small = {"pretrained_cfg": {**network.pretrained_cfg, "input_size": (3, 32, 32)}}
    save_for_hf(network, str(tmp_path / "cnn"), model_config=small, safe_serialization=True)
    vit, cnn, other = (f"local-dir:{tmp_path / name}" for name in ("vit", "cnn", "free"))
    words = ("--dataset", "digits", "--metrics", "distance")
    for student, teacher in ((cnn, vit), (vit, cnn)):
        assert 0 < scores(typed, tmp_path, student, *words, "--against", teacher)[student]["cka"] <= 1
    found = scores(typed, tmp_path, vit, *words, "--against", other)[vit]
    images, _ = digits(Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9))
    with torch.no_grad():
        ours = transformer.forward_head(transformer.forward_features(images), pre_logits=True)
        images = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
        theirs = free.forward_head(free.forward_features(images), pre_logits=True)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(ours, theirs).mean()), rel=1e-3)
    save(tmp_path / "gray", 0, in_chans=1)
    gray = f"local-dir:{tmp_path / 'gray'}"
    assert (
        "takes images of 1 channels"
        in typed("evaluate", vit, *words, "--against", gray, "--device", "cpu", "--workers", "0", code=2).err
    )


def test_images_are_renormalized() -> None:
    own = Preprocessing((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    shown = Preprocessing((3, 4, 4), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    pixels = torch.rand(2, 3, 4, 4)

    def normalize(spec: Preprocessing) -> Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        return (pixels - mean) / std

    from graftvit.launch.evaluation import Candidate

    candidate = Candidate("x", nn.Identity(), lambda images: images, own, 10, cast(Any, None))
    torch.testing.assert_close(predictor(candidate, shown)(normalize(shown)), normalize(own))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    changes: dict[str, dict[str, int]] = {"a": {}, "large": {"img_size": 32}, "seven": {"num_classes": 7}}
    for name, arguments in {**changes, "headless": {"num_classes": 0}}.items():
        save(folder / name, 0, **arguments)
    return {name: f"local-dir:{folder / name}" for name in (*changes, "headless")}


def test_models_of_two_sizes_are_measured_as_each_alone(
    models: dict[str, str], tmp_path: Path, typed: Typed
) -> None:
    words = ("--dataset", "digits", "--metrics", "top1,knn,distance", "--against", models["large"])
    both = scores(typed, tmp_path, models["a"], models["large"], *words)
    for name in ("a", "large"):
        alone = scores(typed, tmp_path, models[name], *words)[models[name]]
        for key in ("top1", "loss", "knn_top1", "samples"):
            assert both[models[name]][key] == pytest.approx(alone[key], abs=1e-4)
    assert both[models["large"]]["relative_error"] == pytest.approx(0, abs=1e-5)
    logits, targets = list[Tensor](), torch.empty(0)
    for size in (16, 32):
        spec = Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)
        images, targets = digits(spec)
        name = "a" if size == 16 else "large"
        with torch.no_grad():
            logits.append(graftvit.load(models[name]).eval()(images))
    mean = torch.stack([each.softmax(-1) for each in logits]).mean(0)
    loss = -mean.gather(1, targets[:, None]).log().mean().item()
    assert both["ensemble"]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{a} {a}", ["named twice"]),
        ("{a} {seven}", ["7 classes", "10"]),
        ("{headless} --metrics top1", ["no classification head", "knn"]),
        ("{a} --metrics top", ["--metrics", "did you mean 'top1'"]),
        ("{a} --metrics distance", ["--against"]),
        ("{a} --metrics knn --against {a}", ["--against", "distance"]),
        ("{a} --metrics knn --real", ["--real", "--metrics knn"]),
        ("{a} --subset imagenet-a", ["10 classes", "subset"]),
        ("{a} --subset imagenet-x", ["imagenet-x", "imagenet-r"]),
        ("{a} --mixup 0.8", ["--mixup has no effect on this command"]),
        ("{a} --json /nowhere/x.json", ["--json", "/nowhere/x.json"]),
        ("local-dir:/nowhere", ["/nowhere"]),
        ("", ["CHECKPOINT"]),
        ("{a} --data_path /nowhere --dataset folder", ["/nowhere"]),
    ],
)
def test_mistakes_are_named(line: str, parts: list[str], models: dict[str, str], typed: Typed) -> None:
    data = "" if "--dataset" in line else " --dataset digits --workers 0 --device cpu"
    error = typed(f"evaluate {line.format(**models)}{data}", code=2).err.splitlines()[-1]
    assert error.startswith("graftvit: error: ")
    assert [part for part in parts if part not in error] == []


def test_a_teacher_is_described(tmp_path: Path, typed: Typed) -> None:
    save(tmp_path / "a", 0, mean=0.25)
    shown = typed(f"checkpoint info local-dir:{tmp_path}/a").out
    wanted = (
        "vit_tiny_patch16_224",
        "2 blocks",
        "2 heads of width 12",
        "4 x 4",
        "cls",
        "0.25",
        "10",
        "loaded",
    )
    assert [part for part in wanted if part not in shown] == []
    shown = typed(f"checkpoint info local-dir:{tmp_path}/a --teacher.img_size 32").out
    assert "8 x 8" in shown
    assert "resampled pos_embed" in shown


PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
SMALL = ["--device", "cpu", "--workers", "0"]
SHORT = [*SMALL, "--max_steps", "2", "--batch_size", "8", "--aa", "none", "--warmup_epochs", "0"]
SHORT += ["--trackers", "none"]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def save_gray(folder: Path, num_classes: int) -> str:
    torch.manual_seed(num_classes)
    model, arguments = tiny_vit(num_classes=num_classes), {**ARGUMENTS, "num_classes": num_classes}
    return save_model(folder, model, ARCHITECTURE, arguments, mean=(0.5,), std=(0.5,), input_size=(1, 8, 8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the runs that the page speaks of."""
    root = tmp_path_factory.mktemp("evaluation")
    save_gray(root / "classifier", 1000)
    encoder, two = save_gray(root / "encoder", 0), save_gray(root / "two", 2)
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
    small_ade20k(root / "ade20k")
    size: Any = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    for name, plan in {"teacher": "*: softmax", "converted": "*: linear"}.items():
        graftvit.save(graftvit.convert(timm.create_model("vit_tiny_patch16_224", **size), plan), root / name)
    finetune = f"--mode finetune --student.model {two} --data_path {root}/photos"
    align = (
        f"--mode align --student.model {encoder} --teacher {encoder} --plan *:linear --data_path {root}/pile"
    )
    for name, line in {"task": finetune, "other": f"{finetune} --seed 1", "align": align}.items():
        assert main(["train", *line.split(), *SHORT, "--output_dir", str(root / "runs" / name)]) == 0
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
    interval = "[95 % interval]"
    heads = (
        f"top-1 % {interval}",
        "top-5 %",
        "  loss",
        f"kNN top-1 % {interval}",
        f"probe top-1 % {interval}",
    )
    assert f"| {' | '.join(heads)} | relative error | cosine |    CKA |" in table
    assert f"100.00 [{100 * low:.1f}, 100.0] |" in table
    assert "by layer:\n\n| layer | relative error | cosine |    CKA |\n" in table
    assert f"| 01    | {found['relative_error_layer01']:14.4f} | {found['cosine_layer01']:6.4f} |" in table


def test_a_run_is_held_against_the_classes_of_the_folder_that_is_given(
    place: Path, tmp_path: Path, typed: Typed
) -> None:
    """A run's own number of classes is that of its own data, and says nothing of another folder."""
    run, model, thousand = tmp_path / "run", f"local-dir:{place / 'classifier'}", tmp_path / "thousand"
    for label in range(1000):
        write_images(thousand / "train" / f"{label:03d}", 1)
    write_images(thousand / "validation" / "007", 12)
    words = ["--student.model", model, "--data_path", str(thousand), "--num_classes", "1000", *SHORT]
    typed("train", "--mode", "finetune", *words, "--output_dir", run)
    assert measured(place, tmp_path, str(run))[str(run)]["samples"] == 12
    variant = [str(run), "--data_path", str(place / "imagenet-a")]
    assert "add --subset imagenet-a" in typed("evaluate", *variant, *SMALL, code=2).err
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
    ("line", "parts"),
    [
        ("{encoder} --data_path {pile}", ["the images have no labels", "--against TEACHER"]),
        ("{encoder} --data_path {pile} --metrics knn", ["the images have no labels"]),
        ("{encoder} --data_path {imagenet-a}", ["apart from the test images", "'train'"]),
        ("{encoder} --data_path {photos} --val_split train", ["apart from the test images"]),
        ("{classifier} --data_path {imagenet-a}", ["200 classes", "1000 logits", "--subset imagenet-a"]),
        ("{classifier} --data_path {imagenet-a} --num_classes 1000", ["--subset imagenet-a"]),
        ("{classifier} --data_path {photos}", ["2 classes", "1000 logits", "--metrics knn"]),
        ("{encoder} --data_path {imagenet-a} --subset imagenet-a", ["--subset", "without a head"]),
        ("{two} --data_path {imagenet-a}", ["200 classes", "2 logits"]),
        ("{two} --data_path {uneven} --metrics knn", ["training split has no images of: gray"]),
    ],
)
def test_what_does_not_go_together_is_refused(line: str, parts: list[str], place: Path, typed: Typed) -> None:
    if not (place / "uneven").exists():
        class_folder(place / "uneven")
        write_images(place / "uneven" / "validation" / "gray", 2)
    names: dict[str, Any] = {name: f"local-dir:{place / name}" for name in ("encoder", "classifier", "two")}
    names |= {name: place / name for name in ("pile", "photos", "imagenet-a", "uneven")}
    message = typed(f"evaluate {line.format(**names)}", *SMALL, code=2).err
    assert message.count("\n") == 1
    assert [part for part in parts if part not in message] == [], message
