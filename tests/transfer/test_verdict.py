"""What a run says at its end: the numbers against references, in every mode, again after a resume, never a failure."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.pretrained import load, load_pretrained
from graftvit.launch.summary import summarize
from graftvit.transfer import verdict as under_test
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import loading
from graftvit.transfer.engine.tasks import TransferTask, classification_loss
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.verdict import PAGE, RECORD, Verdict, advise, gradient_norms, read_verdict
from support.runs.engine_runs import config, several_losses, tiny_vit
from support.runs.interrupting import terminated_after
from support.slurm.sweep_folders import make_sweep, write_run
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("few_digits")
REPORT = {"report": True}


@pytest.fixture(scope="module")
def finished(
    teacher: Path, few_digits: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Verdict]:
    """A run that has ended, and what it said; each test leaves its folder as it was."""
    run = config(tmp_path_factory.mktemp("finished") / "run", teacher, engine=REPORT)
    said = train(run).verdict
    assert said is not None
    return run, said


def double(seed: int, **arguments: Any) -> nn.Module:
    """A float64 model whose attention is far from uniform, without dropout."""
    torch.manual_seed(seed)
    model = tiny_vit(**arguments).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    return model


def dense_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The map (B, H, N, N) of each block, from what timm's attention is given."""
    maps: list[Tensor] = []

    def keep(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        B, N, _ = inputs[0].shape
        q, k, _ = attention.qkv(inputs[0]).view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps.append((attention.scale * q @ k.transpose(-2, -1)).softmax(-1))

    model.eval()
    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize(
    "options", [{}, {"loss": "kl"}, {"temperature": 3.0, "rows": 0.3}, {"layers": [(1, 0)], "heads": [1]}]
)
def test_the_divergence_is_that_of_dense_maps(options: dict[str, Any]) -> None:
    """Cross-entropy less entropy, whatever loss, temperature and rows a step has."""
    teacher, student, images = double(0), double(1), torch.randn(3, 1, 8, 8).double()
    theirs, ours = dense_maps(teacher, images), dense_maps(student, images)
    pairs = options.get("layers", [(0, 0), (1, 1)])
    heads = options.get("heads", [0, 1])
    expected = {
        f"layer{s:02d}": float((theirs[t] * (theirs[t].log() - ours[s].log())).sum(-1)[:, heads].mean())
        for t, s in pairs
    }
    dual = DualViT(teacher, student, method="distill", **options)
    dual.train()
    assert dual.map_divergences(images) == pytest.approx(expected, rel=1e-9)
    assert dual.training
    same = DualViT(teacher, copy.deepcopy(teacher).requires_grad_(True), method="distill", **options)
    if "layers" not in options:
        assert max(same.map_divergences(images).values()) < 1e-12


def test_the_divergence_leaves_the_loss_of_a_step_as_it_was() -> None:
    dual, images = DualViT(double(0), double(1), method="distill"), torch.randn(3, 1, 8, 8).double()
    before = dual(images).transfer_loss
    dual.map_divergences(images)
    assert torch.equal(dual(images).transfer_loss, before)


def test_without_maps_that_learn_there_is_no_divergence() -> None:
    images = torch.randn(3, 1, 8, 8).double()
    assert DualViT(double(0), double(1), method="feature").map_divergences(images) == {}


def test_norms_are_those_of_gradients_by_hand() -> None:
    losses = [{"method": "distill", "weight": 2.0}, {"method": "feature", "weight": 0.5}]
    dual = DualViT(
        double(0), double(1, embed_dim=24, num_heads=2), losses=losses
    )  # the feature has a projector
    task, images = TransferTask(dual, 0.1, task_weight=0.25), torch.randn(4, 1, 8, 8).double()
    targets = torch.tensor([1, 2, 3, 4])
    norms = gradient_norms(task, task(images, targets), scale=1024.0)
    output = dual(images)
    by_hand = {
        "task": 0.25 * classification_loss(output.logits, targets, 0.1),
        "distill": 2.0 * (output.parts["distill.layer00"] + output.parts["distill.layer01"]),
        "feature": 0.5 * output.terms["feature"],
    }
    for name, loss in by_hand.items():
        dual.zero_grad()
        loss.backward(retain_graph=True)
        found = [parameter.grad for parameter in dual.student.parameters() if parameter.grad is not None]
        assert norms[name] == pytest.approx(
            sum(float(each.square().sum()) for each in found) ** 0.5, rel=1e-6
        )
    assert norms.keys() == by_hand.keys()


def test_the_advised_weight_gives_both_losses_one_gradient() -> None:
    def norms_of(weight: float) -> dict[str, float]:
        dual = DualViT(double(0), double(1), method="distill", weight=weight)
        task, images = TransferTask(dual, 0.0), torch.linspace(-1, 1, 256).view(4, 1, 8, 8).double()
        return gradient_norms(task, task(images, torch.tensor([1, 2, 3, 4])))

    norms = norms_of(1e4)
    advice = advise(norms, {"distill": ("transfer.weight", 1e4)})
    weight = float(advice.partition("transfer.weight=")[2].split()[0])
    norms = norms_of(weight)
    assert norms["distill"] == pytest.approx(norms["task"], rel=0.05)  # two digits are given
    assert advise(norms, {"distill": ("transfer.weight", weight)}) == ""


def test_advice_begins_at_fifteen_times_the_task() -> None:
    weights = {"a": ("transfer.losses[0].weight", 3.0), "b": ("transfer.losses[1].weight", 1.0)}
    assert advise({"task": 1.0, "a": 14.9, "b": 2.0}, weights) == ""
    assert "transfer.losses[0].weight=0.2 " in advise({"task": 1.0, "a": 15.0, "b": 2.0}, weights)
    assert "transfer.losses[1].weight" in advise({"task": 1.0, "a": 15.0, "b": 20.0}, weights)
    assert advise({"a": 15.0, "b": 2.0}, weights) == ""  # no labels, so nothing to balance


def test_a_finished_run_that_is_resumed_has_the_same_verdict_and_a_new_page(
    finished: tuple[RunConfig, Verdict], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = finished
    record = (run.output_dir / RECORD).read_bytes()
    (run.output_dir / RECORD).unlink()
    (run.output_dir / PAGE).unlink()
    assert train(run).verdict == said  # measured again
    assert set(said.lines(run.output_dir)) <= set(caplog.messages)
    assert (run.output_dir / RECORD).read_bytes() == record
    assert "KL divergence" in (run.output_dir / PAGE).read_text()
    monkeypatch.setattr(under_test, "measure", None)
    assert train(run).verdict == said == read_verdict(run.output_dir)


def test_the_maps_of_a_loss_of_other_things_are_those_of_the_written_student(
    tmp_path: Path, teacher: Path
) -> None:
    pairs = [(0, 1), (1, 0)]
    transfer = {"method": "attention_output", "layers": pairs}
    run = config(
        tmp_path / "run", teacher, engine=REPORT, transfer=transfer, data={"val_split": None, "mixup": 0.0}
    )
    found = train(run).verdict
    assert found is not None
    shown: list[Tensor] = []
    models = load_pretrained(f"local-dir:{teacher}"), load(run.output_dir)
    dual = DualViT(*models, "distill", layers=pairs)
    (run.output_dir / RECORD).unlink()
    real = under_test._images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "_images", lambda *given: (shown.append(real(*given)[0]), real(*given))[1])
        assert train(run).verdict == found
    assert found.divergences == pytest.approx(dual.map_divergences(shown[0]), rel=1e-5)


def test_the_verdict_has_the_numbers_of_the_run(tmp_path: Path, teacher: Path, convnext: Path) -> None:
    run = config(tmp_path / "run", teacher, engine=REPORT, **several_losses(convnext))
    result = train(run)
    found = json.loads((run.output_dir / RECORD).read_text())
    assert (found["last"], found["best"]) == (result.metrics["test_top1"], result.metrics["best_top1"])
    assert found["gain"] == pytest.approx(result.metrics["test_top1"] - result.metrics["teacher_top1"])
    assert found["gradients"].keys() == {"task", "distill", "feature@convnext", "logits@convnext"}
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["divergences"].keys() == {"distill.layer00"}
    assert found["map_divergence"] == found["divergences"]["distill.layer00"]


OTHERS: dict[str, dict[str, Any]] = {
    "scratch": {"mode": "scratch", "teacher": {"source": None}},
    "pretrain": {"mode": "pretrain", "teacher": {"source": None}, "data": {"mixup": 0.0}},
    "finetune": {"mode": "finetune"},
    "align": {"mode": "align", "student": {"plan": "*: linear"}, "data": {"mixup": 0.0}},
    "copy": {"transfer": {"method": "copy"}},
    "logits": {"transfer": {"method": "logits"}},
    "queries": {"transfer": {"method": "distill_q"}},
    "no labels": {"transfer": {"task_weight": 0.0}, "data": {"mixup": 0.0}},
    "no test images": {"data": {"val_split": None}},
    "one evaluation": {"mode": "scratch", "teacher": {"source": None}, "optim": {"epochs": 1, "ema": None}},
    "accumulated": {"optim": {"accum_iter": 2}},
    "converted": {"student": {"plan": "0: linear"}, "transfer": {"layers": "1"}},
}


MAPS = ("queries", "no labels", "no test images", "accumulated", "converted")


SLOW = ("finetune", "no labels", "one evaluation", "accumulated", "converted")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OTHERS]
)
def test_every_kind_of_run_has_a_verdict(
    name: str, tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tmp_path / "run", teacher, **{"engine": REPORT, **OTHERS[name]})
    found = train(run).verdict
    assert found is not None
    assert "lacks a part" not in caplog.text
    assert bool(found.divergences) == (name in MAPS)
    assert len(found.gradients) == {"logits": 2, "copy": 1, "no labels": 1}.get(
        name, 2 if found.divergences else 0
    )
    assert (run.output_dir / PAGE).is_file()


def test_a_run_with_kept_targets_shares_its_gradient_without_a_teacher(tmp_path: Path, teacher: Path) -> None:
    transfer = {"method": "logits", "cache": str(tmp_path / "targets")}
    run = config(tmp_path / "run", teacher, engine=REPORT, transfer=transfer, data={"mixup": 0.0, "views": 2})
    found = train(run).verdict
    assert found is not None
    assert found.gradients.keys() == {"task", "logits"}
    (run.output_dir / RECORD).unlink()
    assert train(run).verdict == found


def test_no_failure_of_the_verdict_fails_a_finished_run(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for maps")

    monkeypatch.setattr(DualViT, "map_divergences", fail)
    run = config(tmp_path / "run", teacher, engine=REPORT)
    found = train(run)
    assert found.finished
    assert found.verdict is not None
    assert found.verdict.gradients
    assert [text for text in caplog.messages if "no room for maps" in text][1:] == []
    caplog.clear()
    monkeypatch.setattr(under_test, "render", fail)
    assert train(run).finished
    assert len([text for text in caplog.messages if "no room for maps" in text]) == 1


def test_a_damaged_record_is_measured_again(finished: tuple[RunConfig, Verdict]) -> None:
    run, said = finished
    (run.output_dir / RECORD).write_text('{"step": -1}')
    assert train(run).verdict == said


def test_a_run_that_is_stopped_or_wants_no_report_has_no_verdict(tmp_path: Path, teacher: Path) -> None:
    run = config(tmp_path / "run", teacher, engine=REPORT)
    with terminated_after(3):
        assert train(run).signal == signal.SIGTERM
    assert not (run.output_dir / RECORD).exists()
    quiet = RunConfig.model_validate(
        {**run.model_dump(), "engine": {**run.engine.model_dump(), "report": False}}
    )
    assert train(quiet).verdict is None
    assert not (run.output_dir / RECORD).exists()


def test_few_images_are_read_and_none_by_other_processes(
    finished: tuple[RunConfig, Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    (run.output_dir / RECORD).unlink()
    read: list[int] = []
    real = loading.EvalBatches.__getitem__
    monkeypatch.setattr(
        loading.EvalBatches,
        "__getitem__",
        lambda batches, request: (read.append(len(request.indices)), real(batches, request))[1],
    )
    train(run)
    assert sum(read) == under_test.IMAGES


def test_a_sweep_is_summarized_with_the_divergence(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..1")
    for cell, value in zip(cells, ("0.25", "null"), strict=True):
        write_run(cell, [1.0, 2.0])
        (cell / RECORD).write_text(f'{{"map_divergence": {value}}}')
    assert [row.values("map_divergence") for row in summarize(tmp_path)] == [[0.25]]
