"""The engine on digits: what a run leaves, in every mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.loop import Loop
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder
from support.runs.engine_runs import config, make_teacher, records, state, tiny_vit
from torch.utils._python_dispatch import TorchDispatchMode


def student_state(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state(folder).items() if k.startswith(prefix)}


def test_a_run_leaves_a_whole_folder(tmp_path: Path, teacher: Path) -> None:
    run = config(tmp_path, teacher, engine={"trackers": ("tensorboard",)})
    result = train(run)
    assert (result.finished, result.signal, result.steps) == (True, None, 16)
    assert RunConfig.model_validate(parse_yaml((tmp_path / "config.yaml").read_text())) == run
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last = log[-1]
    for key in ("train_loss", "train_task", "train_transfer", "train_layer00", "train_layer01", "lr", "test_top1",
                "test_top5", "test_loss", "test_ema_top1", "seconds", "images_per_second", "data_wait"):  # fmt: skip
        assert isinstance(last[key], int | float), key
    assert (last["epoch"], last["step"]) == (1, 16)
    parts = last["train_layer00"] + last["train_layer01"]
    assert last["train_transfer"] == pytest.approx(3 * parts, rel=1e-5)
    assert last["train_loss"] == pytest.approx(last["train_task"] + last["train_transfer"], rel=1e-5)
    assert [record["step"] for record in log] == [0, 3, 6, 8, 9, 12, 15, 16]
    assert log[0]["teacher_top1"] == result.metrics["teacher_top1"]
    assert result.metrics["test_top1"] == last["test_top1"]
    assert result.metrics["best_top1"] == max(r["test_ema_top1"] for r in log if "test_ema_top1" in r)
    assert list((tmp_path / "tensorboard").glob("events*"))
    names = {"config.yaml", "log.jsonl", "checkpoints", "student", "student_ema", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_student_is_plain_timm_and_the_teacher_is_nowhere(tmp_path: Path, teacher: Path) -> None:
    """A state can teach by itself."""
    train(config(tmp_path, teacher, student={"mirror_teacher": True}))
    for folder, prefix in (("student", "student."), ("student_ema", "ema.")):
        model = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        expected = student_state(tmp_path, prefix)
        assert model.state_dict().keys() == expected.keys() == tiny_vit(global_pool="avg").state_dict().keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        part = "#ema" if prefix == "ema." else ""
        taught = load_pretrained(f"{tmp_path / 'checkpoints' / 'last.safetensors'}{part}")
        exported = load_pretrained(f"local-dir:{tmp_path / folder}")
        assert (taught.architecture, taught.mean, taught.std) == (exported.architecture, (0.5,), (0.5,))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in taught.model.state_dict().items())
    assert {name.split(".")[0] for name in state(tmp_path)} == {"student", "ema", "optimizer", "meters"}


def test_only_what_learns_is_counted(tmp_path: Path, teacher: Path) -> None:
    parameters = dict(tiny_vit(global_pool="avg").named_parameters())
    train(config(tmp_path / "all", teacher))
    assert records(tmp_path / "all")[-1]["n_parameters"] == sum(p.numel() for p in parameters.values())
    train(config(tmp_path / "some", teacher, optim={"trainable": "mlp", "ema": None}))
    learning = {n: p for n, p in parameters.items() if "mlp" in n or n.startswith("head.")}
    assert records(tmp_path / "some")[-1]["n_parameters"] == sum(p.numel() for p in learning.values())
    slots = student_state(tmp_path / "some", "optimizer.")
    assert {name.removeprefix("dual.student.").split("|")[0] for name in slots} == set(learning)
    assert not (tmp_path / "some" / "student_ema").exists()


@pytest.mark.parametrize(
    "method", ["copy", "copy_q", "distill_v", "attention_output", "block_output", "feature", "logits"]
)
def test_every_kind_of_transfer_runs(tmp_path: Path, teacher: Path, method: str) -> None:
    result = train(config(tmp_path, teacher, transfer={"method": method}, optim={"max_steps": 3}))
    assert result.finished
    assert ("train_transfer" in records(tmp_path)[-1]) == (not method.startswith("copy"))


def test_finetuning_starts_from_the_teacher_with_a_small_head(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", classes=12)
    run = config(tmp_path / "run", teacher, mode="finetune")
    parts = build(run)
    assert parts.teacher is None
    weights = load_pretrained(f"local-dir:{teacher}").model.state_dict()
    student = parts.task.trainable.state_dict()
    assert all(torch.equal(student[name], weights[name]) for name in student if name.startswith("blocks"))
    assert 0 < float(student["head.weight"].std()) < 4e-5
    assert train(run).finished


def test_pretraining_leaves_an_encoder_that_can_teach(tmp_path: Path) -> None:
    result = train(config(tmp_path / "mae", mode="pretrain", data={"mixup": 0.0}))
    assert result.finished
    assert not any(key.startswith("test") for key in result.metrics)
    encoder, short = tmp_path / "mae" / "student", {"max_steps": 2}
    assert not load_pretrained(f"local-dir:{encoder}").has_head
    assert train(config(tmp_path / "taught", encoder, optim=short)).finished
    assert "teacher_top1" not in records(tmp_path / "taught")[0]
    start = {"init": f"local-dir:{encoder}"}
    assert train(config(tmp_path / "tuned", mode="finetune", student=start, optim=short)).finished


def test_how_often_one_looks_does_not_change_the_run(tmp_path: Path, teacher: Path) -> None:
    train(config(tmp_path / "often", teacher, engine={"eval_every": 1, "log_interval": 1, "save_every": 2}))
    train(config(tmp_path / "seldom", teacher, engine={"eval_every": 9, "evaluate_teacher": False}))
    often, seldom = state(tmp_path / "often"), state(tmp_path / "seldom")
    learned = [name for name in often if not name.startswith("meters")]
    assert all(torch.equal(often[name], seldom[name]) for name in learned)


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    optim = {"blr": 0.03, "opt": "sgd", "max_steps": 3, "clip_grad": None}
    for name, size, accum in (("one", 32, 1), ("two", 16, 2)):
        data = {"batch_size": size, "mixup": 0.0}
        train(
            config(
                tmp_path / name, student={"drop_path": 0.0}, data=data, optim={**optim, "accum_iter": accum}
            )
        )
    one, two = (student_state(tmp_path / name, "student.") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


SHORT = {"max_steps": 4, "warmup_epochs": 0.25}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The folder of a short run with no setting changed."""
    folder = tmp_path_factory.mktemp("unchanged")
    train(config(folder, teacher, optim=SHORT))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"optim.clip_grad": 1e-3}, {"optim.ema": 0.1}, {"optim.layer_decay": 0.5}, {"optim.weight_decay": 0.9},
        {"optim.min_lr": 1e-3}, {"optim.warmup_epochs": 0.0}, {"optim.lr": 1e-2}, {"optim.betas": (0.5, 0.6)},
        {"optim.opt": "sgd"}, {"student.drop_path": 0.0}, {"student.pos_embed_std": 0.5}, {"student.init": "teacher"},
        {"student.global_pool": "token"}, {"data.smoothing": 0.3, "data.mixup": 0.0}, {"engine.precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_no_setting_is_idle(tmp_path: Path, teacher: Path, unchanged: Path, change: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"optim": {**SHORT}}
    for key, value in change.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    train(config(tmp_path, teacher, **sections))
    a, b = state(unchanged), state(tmp_path)
    learned = [name for name in a if name.startswith(("student.", "ema.", "projectors."))]
    assert a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in learned)


class Synchronisations(TorchDispatchMode):
    """Counts the operations that make a device hand a number to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, real = [], Loop._step

    def step(self: Loop, batches: Any) -> None:
        batch = next(batches)  # the loader works on the processor
        with Synchronisations() as seen:
            real(self, iter([batch]))
        counts.append(seen.count)

    monkeypatch.setattr(Loop, "_step", step)
    # torch's AdamW reads its step counters, which it keeps on the processor for that; SGD has none.
    train(config(tmp_path, teacher, optim={"opt": "sgd", "clip_grad": 1.0}))
    assert counts == [0] * 16


@pytest.mark.slow
def test_the_task_compiles_in_one_graph(tmp_path: Path, teacher: Path) -> None:
    for method in ("distill", "copy"):
        run = config(tmp_path, teacher, student={"drop_path": 0.0}, transfer={"method": method})
        parts = build(run)
        images, targets = next(iter(parts.train_loader.epoch(0)))
        eager = parts.task(images, targets)
        compiled = torch.compile(parts.task, backend="eager", fullgraph=True)(images, targets)
        assert eager.keys() == compiled.keys()
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name])


def test_compile_reaches_the_task(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    train(config(tmp_path, teacher, student={"compile": True}, optim={"max_steps": 1}))
    assert asked == [{"fullgraph": True}]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mode": "transfer"}, "mode=transfer needs a teacher: set teacher.source"),
        ({"mode": "finetune"}, "mode=finetune needs weights to start from"),
        ({"student": {"model": "vit_tiny_patch61_224"}}, "is not a timm model: did you mean"),
        ({"student": {"model_args": {"depht": 3}}}, r"cannot be built with .*depht"),
        ({"student": {"init": "teacher"}}, "student.init=teacher needs a teacher"),
        ({"student": {"mirror_teacher": True}}, "student.mirror_teacher=true needs a teacher"),
        ({"engine": {"fsdp": True}}, "engine.fsdp=true shards over processes and this run has one"),
        ({"engine": {"precision": "fp16"}}, "engine.precision=fp16 needs a GPU"),
        ({"optim": {"opt": "adamww"}}, "optim.opt='adamww'"),
        ({"optim": {"trainable": "nothing"}}, "optim.trainable='nothing' matches no parameter"),
        ({"mode": "transfer", "teacher": {"source": "/nowhere/at/all"}}, "nowhere"),
        ({"output_dir": "FILE/run"}, r"output_dir=.*cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    (tmp_path / "FILE").touch()
    folder = tmp_path / sections.pop("output_dir", "run")
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        train(config(folder, **sections))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["scratch", "pretrain"])
def test_a_teacher_that_the_mode_does_not_use_is_refused(mode: str, tmp_path: Path) -> None:
    run = config(tmp_path / "run", mode=mode, teacher={"source": "local-dir:teacher"})
    with pytest.raises(
        ConfigError, match=rf"teacher.source='local-dir:teacher' changes nothing with mode={mode}"
    ):
        train(run)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_without_a_validation_split_trains_and_leaves_its_last_student(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "photos", validation=0)
    data = {"dataset": "", "data_path": str(folder), "val_split": None, "train_samples": None, "mixup": 0.0}
    result = train(config(tmp_path / "run", data=data))
    assert result.finished
    assert not [key for record in records(tmp_path / "run") for key in record if key.startswith("test_")]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
