from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.launch.evaluation import predictor
from graftvit.launch.load_config import load_config
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.train import train
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
    write_student(
        model,
        folder,
        architecture="vit_tiny_patch16_224",
        model_args=arguments,
        preprocessing=Preprocessing.of(model, mean=(mean,) * 3, std=(std,) * 3),
    )
    return model


def digits(spec: Preprocessing) -> tuple[Tensor, Tensor]:
    loader = create_eval_loader(load_config(None, ["dataset=digits", "workers=0"]).data, spec)
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def scores(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, dict[str, float]]:
    path = tmp_path / "scores.json"
    assert main(["evaluate", *words, "--device", "cpu", "--workers", "0", "--json", str(path)]) == 0
    table = capsys.readouterr().out
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    assert all(f"| {name} " in table for name in found)
    return found


def test_each_and_the_ensemble_are_what_a_plain_loop_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save(tmp_path / "a", 0), save(tmp_path / "b", 1, mean=0.2, std=0.3)
    names = [f"local-dir:{tmp_path / name}" for name in "ab"]
    found = scores(capsys, tmp_path, *names, "--dataset", "digits", "--batch_size", "64")
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
def test_a_run_is_evaluated_as_it_evaluated_itself(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "teacher", 3)
    run = tmp_path / method
    overrides = [*RUN, f"teacher=local-dir:{tmp_path / 'teacher'}", f"method={method}", f"output_dir={run}"]
    result = train(load_config(None, overrides))
    found = scores(capsys, tmp_path, str(run))[str(run)]
    assert found["top1"] == pytest.approx(result.metrics["test_top1"])
    assert found["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    (tmp_path / "teacher").rename(tmp_path / "gone")
    (run / "student").rename(tmp_path / "moved")
    moved = f"local-dir:{tmp_path / 'moved'}"
    again = scores(capsys, tmp_path, moved, "--dataset", "digits", "--batch_size", "20")[moved]
    assert again["top1"] == found["top1"]


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_the_features_of_knn_and_probe_are_named(
    pooling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "teacher", 3)
    teacher, run = f"local-dir:{tmp_path / 'teacher'}", tmp_path / "run"
    settings = [f"teacher={teacher}", f"global_pool={pooling}", f"output_dir={run}"]
    train(load_config(None, [*RUN, *settings]))
    capsys.readouterr()
    words = ["--metrics", "knn,probe", "--device", "cpu", "--workers", "0"]
    assert main(["evaluate", str(run), *words]) == 0
    found = capsys.readouterr().out
    assert f"kNN and probe of {run}: 24 features of an image, pooled by {pooling}" in found
    warning = f"warning: {run} is pooled by avg and its teacher {teacher} by token"
    assert (warning in found) == (pooling == "avg")
    assert main(["evaluate", str(run), "--device", "cpu", "--workers", "0"]) == 0
    assert "kNN" not in capsys.readouterr().out


def test_models_that_take_other_images_are_named_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", 0)
    save(tmp_path / "b", 0, img_size=32)
    names = [f"local-dir:{tmp_path / name}" for name in "ab"]
    assert main(["evaluate", *names, "--dataset", "digits"]) == 2
    assert f"and {names[0]!r} of input_size" in capsys.readouterr().err


def test_a_teacher_of_any_kind_is_shown_its_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = save(tmp_path / "vit", 0)
    free = save(tmp_path / "free", 1, img_size=32, dynamic_img_size=True)
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10)
    small = {"pretrained_cfg": {**network.pretrained_cfg, "input_size": (3, 32, 32)}}
    save_for_hf(network, str(tmp_path / "cnn"), model_config=small, safe_serialization=True)
    vit, cnn, other = (f"local-dir:{tmp_path / name}" for name in ("vit", "cnn", "free"))
    words = ("--dataset", "digits", "--metrics", "distance")
    for student, teacher in ((cnn, vit), (vit, cnn)):
        assert 0 < scores(capsys, tmp_path, student, *words, "--against", teacher)[student]["cka"] <= 1
    found = scores(capsys, tmp_path, vit, *words, "--against", other)[vit]
    images, _ = digits(Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9))
    with torch.no_grad():
        ours = transformer.forward_head(transformer.forward_features(images), pre_logits=True)
        images = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
        theirs = free.forward_head(free.forward_features(images), pre_logits=True)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(ours, theirs).mean()), rel=1e-3)
    save(tmp_path / "gray", 0, in_chans=1)
    gray = f"local-dir:{tmp_path / 'gray'}"
    assert main(["evaluate", vit, *words, "--against", gray, "--device", "cpu", "--workers", "0"]) == 2
    assert "takes images of 1 channels" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{a}", "{a}"], ["named twice"]),
        (["{a}", "{large}"], ["input_size=(3, 32, 32)", "input_size=(3, 16, 16)"]),
        (["{a}", "{seven}"], ["7 classes", "10"]),
        (["{headless}", "--metrics", "top1"], ["no classification head", "knn"]),
        (["{a}", "--metrics", "top"], ["--metrics", "did you mean 'top1'"]),
        (["{a}", "--metrics", "distance"], ["--against"]),
        (["{a}", "--metrics", "knn", "--against", "{a}"], ["--against", "distance"]),
        (["{a}", "--metrics", "knn", "--real"], ["--real", "--metrics knn"]),
        (["{a}", "--subset", "imagenet-a"], ["10 classes", "subset"]),
        (["{a}", "--subset", "imagenet-x"], ["imagenet-x", "imagenet-r"]),
        (["{a}", "--mixup", "0.8"], ["--mixup has no effect on this command"]),
        (["{a}", "--json", "/nowhere/x.json"], ["--json", "/nowhere/x.json"]),
        (["local-dir:/nowhere"], ["/nowhere"]),
        ([], ["CHECKPOINT"]),
        (["{a}", "--data_path", "/nowhere", "--dataset", "folder"], ["/nowhere"]),
    ],
)
def test_mistakes_are_named(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", 0)
    save(tmp_path / "large", 0, img_size=32)
    save(tmp_path / "seven", 0, num_classes=7)
    save(tmp_path / "headless", 0, num_classes=0)
    places = {name: f"local-dir:{tmp_path / name}" for name in ("a", "large", "seven", "headless")}
    data = [] if "--dataset" in words else ["--dataset", "digits", "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", *(word.format(**places) for word in words), *data]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("graftvit: error: ")
    for part in parts:
        assert part in error


def test_a_teacher_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", 0, mean=0.25)
    assert main(["checkpoint", "info", f"local-dir:{tmp_path / 'a'}"]) == 0
    shown = capsys.readouterr().out
    for part in ("vit_tiny_patch16_224", "2 blocks", "2 heads of width 12", "4 x 4", "cls", "0.25",
                 "10", "loaded"):  # fmt: skip
        assert part in shown
    assert main(["checkpoint", "info", f"local-dir:{tmp_path / 'a'}", "--teacher.img_size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "8 x 8" in shown
    assert "resampled pos_embed" in shown
