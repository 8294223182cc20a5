"""What a run that copies attention leaves: a model of its own, with the accuracy that the run logged, on every way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftvit
import onnxruntime
import pytest
import timm
import torch
from graftvit.checkpoints.describe import describe_source
from graftvit.checkpoints.export.export import export_source
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_teacher, load_weights
from graftvit.checkpoints.student import save_student, write_student
from graftvit.launch.cli import main
from graftvit.models.errors import CheckpointError, ConfigError, GraftError
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, tiny_vit
from torch import Tensor

METHODS = ["copy", "copy_q", "copy_k", "copy_v"]


@pytest.fixture(scope="module", autouse=True)
def every_run_has() -> None:
    """Evaluate each run on all digits, so that a student and its average have different accuracies."""


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """All test images as the students want them, which is as their teacher does, and their classes."""
    loader = create_eval_loader(
        config(tmp_path_factory.mktemp("unused")).data, Preprocessing((1, 8, 8), (0.2,), (0.3,))
    )
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def odd_teacher(folder: Path) -> Path:
    """Deeper, wider, with registers, for larger images of another mean, with a norm of another epsilon."""
    torch.manual_seed(5)
    arguments = {**ARGUMENTS, "depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 8}
    arguments |= {"num_classes": 3, "reg_tokens": 2, "qk_norm": True}
    model = timm.create_model(ARCHITECTURE, **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.3
    write_student(
        model, folder, architecture=ARCHITECTURE, model_args=arguments, license="cc-by-nc-4.0",
        preprocessing=Preprocessing.of(model, mean=(0.2,), std=(0.3,)),
    )  # fmt: skip
    return folder


def top1(logits: Tensor, targets: Tensor) -> float:
    return (logits.argmax(1) == targets).double().mean().item() * 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by method, with their teacher gone, and what each measured."""
    made: dict[str, tuple[Path, dict[str, float]]] = {}

    def run(method: str) -> tuple[Path, dict[str, float]]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            teacher = odd_teacher(folder / "teacher")
            transfer: dict[str, Any] = {"method": method, "heads": "3>0,1>1", "share_drop_path": False}
            if method == "copy":
                transfer |= {"heads": "mean", "layers": [(2, 1)]}
            optim = {"max_steps": 6, "blr": 1.0, "ema": 0.5}
            settings = config(folder / "run", teacher, transfer=transfer, optim=optim)
            large = settings.teacher.model_copy(update={"img_size": 16})
            result = train(settings.model_copy(update={"teacher": large}))
            shutil.rmtree(teacher)
            made[method] = folder / "run", result.metrics
        return made[method]

    return run


def exported(source: Path, images: Tensor, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What the exported files of a source give."""
    for name in ("model.onnx", "model.pt2"):
        export_source(source, folder / name)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    yield "ONNX", torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    yield "torch.export", torch.export.load(folder / "model.pt2").module()(images)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_route_gives_the_accuracy_that_was_logged(
    method: str, finished: Any, test_set: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    run, metrics = finished(method)
    images, targets = test_set
    for part, key in (("student", "test_top1"), ("student_ema", "test_ema_top1")):
        folder = tmp_path / "elsewhere" / part
        shutil.copytree(run / part, folder)
        save_student(str(folder), tmp_path / "again" / part)
        models = {
            "graftvit.load": graftvit.load(str(folder)),
            "timm": timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
            "the run": graftvit.load(f"{run}{'#ema' if part == 'student_ema' else ''}"),
            "save": graftvit.load(str(tmp_path / "again" / part)),
        }
        if part == "student_ema":  # scored once, and what is scored is the average; only a state holds it
            models["best"] = graftvit.load(f"{run}#best")
        with torch.no_grad():
            found = {name: top1(model(images), targets) for name, model in models.items()}
        if (method, part) == ("copy", "student"):
            found |= {name: top1(logits, targets) for name, logits in exported(folder, images, tmp_path)}
        assert found == dict.fromkeys(found, pytest.approx(metrics[key], abs=1e-9))
    assert metrics["test_top1"] != metrics["test_ema_top1"]


def test_it_is_evaluated_without_its_teacher(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, metrics = finished("copy")
    words = ["--device", "cpu", "--json", str(tmp_path / "scores.json")]
    assert main(["evaluate", str(run), *words]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())[str(run)]
    assert scores["top1"] == pytest.approx(metrics["test_top1"], abs=1e-9)
    assert scores["loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    assert main(["visualize", str(run), "digits:1", "--out", str(tmp_path / "seen")]) == 0
    numbers = json.loads((tmp_path / "seen" / "numbers.json").read_text())
    assert len(numbers["student"]["entropy"]) == ARGUMENTS["depth"]


def test_it_says_its_license_and_what_it_costs(finished: Any) -> None:
    run, _ = finished("copy")
    written = json.loads((run / "student" / "config.json").read_text())
    assert written["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    count = sum(p.numel() for p in load_teacher(str(run)).model.teacher.parameters())
    cost = written["graftvit"]["cost"]
    assert cost["teacher"]["parameters"] == count
    assert 0 < cost["student"]["macs"] < cost["teacher"]["macs"]
    text, error = describe_source(str(run))
    assert error is None
    for part in ("copies", "vit_tiny_patch16_224", f"{count:,}", "multiply-adds", "2>1"):
        assert part in text


def unfinished(run: Path, folder: Path) -> Path:
    """As a run that was stopped: its states, and no student."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "student_ema")
    return folder


def test_a_state_needs_the_teacher_that_the_run_names(
    finished: Any, test_set: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    run, metrics = finished("copy")
    stopped, (images, targets) = unfinished(run, tmp_path / "stopped"), test_set
    with pytest.raises(CheckpointError, match=r"copies the attention of 'local-dir:.*teacher', .* bare"):
        load_teacher(str(stopped))
    odd_teacher(run.parent / "teacher")
    try:
        for source, key in ((str(stopped), "test_top1"), (f"{stopped}#ema", "test_ema_top1")):
            model = graftvit.load(source)
            with torch.no_grad():
                assert top1(model(images), targets) == pytest.approx(metrics[key], abs=1e-9)
        save_student(str(stopped), tmp_path / "saved")
    finally:
        shutil.rmtree(run.parent / "teacher")
    one, other = (path / "model.safetensors" for path in (tmp_path / "saved", run / "student"))
    assert one.read_bytes() == other.read_bytes()


def test_the_bare_student_is_for_whoever_asks(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished("copy")
    stopped = unfinished(run, tmp_path / "stopped")
    for source, name in ((run, "a"), (stopped, "b")):
        assert main(["checkpoint", "save", str(source), str(tmp_path / name), "--bare"]) == 0
        assert "its own was never trained" in capsys.readouterr().out
    bare = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    assert bare.state_dict().keys() == tiny_vit(global_pool="avg").state_dict().keys()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "results" not in written["graftvit"]
    assert written["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert load_teacher(str(tmp_path / "a")).architecture == ARCHITECTURE
    assert graftvit.load(str(run), bare=True).state_dict().keys() == bare.state_dict().keys()
    with pytest.raises(CheckpointError, match="copies no teacher's attention"):
        graftvit.load(str(tmp_path / "a"), bare=True)


def test_what_it_cannot_be_is_refused_with_what_to_do(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished("copy_q")
    with pytest.raises(CheckpointError, match="--bare"):
        load_weights(timm.create_model(ARCHITECTURE, **ARGUMENTS), str(run))
    with pytest.raises(GraftError, match="--bare"):
        train(config(tmp_path / "init", mode="finetune", student={"init": str(run)}))
    with pytest.raises(ConfigError, match=r"student\.model=.*--bare"):
        train(config(tmp_path / "whole", mode="finetune", student={"model": str(run), "model_args": {}}))
    assert main(["convert", str(run), "--plan", "*: linear", "--out", str(tmp_path / "converted")]) == 2
    assert "--bare" in capsys.readouterr().err
    with pytest.raises(GraftError, match="block_output, feature or logits"):
        train(config(tmp_path / "taught", run, transfer={"method": "distill"}))
    save_student(str(run), tmp_path / "bare", bare=True)
    source, how = str(tmp_path / "bare"), {"max_steps": 1}
    train(config(tmp_path / "next", mode="finetune", student={"init": source}, optim=how))


def test_its_outputs_teach(finished: Any, tmp_path: Path) -> None:
    run, _ = finished("copy_k")
    transfer = {"method": "logits", "share_drop_path": False}
    assert train(config(tmp_path, run, transfer=transfer, optim={"max_steps": 2})).steps == 2


def test_another_size_and_another_head(finished: Any) -> None:
    run, _ = finished("copy")
    model = load_teacher(str(run), img_size=16, num_classes=0).model
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 16)
    assert model.teacher.model.patch_embed.img_size == (32, 32)
    saved = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True, num_classes=3)
    assert saved(torch.rand(1, 1, 8, 8)).shape == (1, 3)
