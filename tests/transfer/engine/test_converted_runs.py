"""Runs of converted students, fitted operators, programs and pyramids: trained, resumed, saved and loaded."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.launch.cli import main
from graftvit.launch.plan_text import describe_plan
from graftvit.models.attention.hash import HashAttention
from graftvit.models.conversion import convert, converted_layers, plan_of
from graftvit.models.errors import CheckpointError, ConfigError, TransferError, UnsupportedModelError
from graftvit.models.families import image_size, sites
from graftvit.models.merges import deformable_merges
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data.survey import sample_images
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from safetensors.torch import save_file
from support.models.pyramids import TINY, images, tiny, write_pyramid
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher, records, resume_cut, state
from support.runs.scenarios import NEEDS_FSDP, RunScenario
from torch import nn

PLAN = "*: linear; 1: softmax"
HASHED = "*: hash(anchors=5, bits=4)"
CODE = "mul(mm(elu1(q) tn(elu1(k) v)) recip(nt(elu1(q) sum(elu1(k)))))"
PROGRAMS = {"plan": f"*: program(code={CODE}); 0: attnzero_105", "without": ["bias"]}
KINDS = ("pvt", "svt", "swin", "swinv2")


def align(output_dir: Path, teacher: Path, **sections: Any) -> RunConfig:
    student = {"model": f"local-dir:{teacher}", "plan": PLAN, "model_args": {}, "drop_path": 0.0}
    return config(output_dir, teacher, **{"mode": "align", "student": student, **sections})


def hashed(
    output_dir: Path, teacher: Path | None, save_every: int | None = None, **student: Any
) -> RunConfig:
    made = {"model": ARCHITECTURE, "model_args": ARGUMENTS, "plan": HASHED, "calibrate": 9, "drop_path": 0.0}
    how = {} if teacher is None else {"transfer": {"method": "attention_output"}}
    return config(output_dir, teacher, student=made | student, engine={"save_every": save_every}, **how)


def pyramid(
    output_dir: Path,
    kind: str,
    student: dict[str, Any] | None = None,
    source: Path | None = None,
    **more: Any,
) -> RunConfig:
    """Four steps of a tiny pyramid of the kind on digits of 32x32, with another state after two."""
    model = {"model": TINY[kind][0], "model_args": TINY[kind][1], "img_size": 32, **(student or {})}
    short = {
        "optim": {"max_steps": 4, "warmup_epochs": 0},
        "data": {"batch_size": 8, "train_samples": 40},
        "engine": {"save_every": 2},
    }
    return config(output_dir, source, student=model, **short | more)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images((32, 32)))  # type: ignore[no-any-return]


def loaded(folder: Path) -> nn.Module:
    """Load a saved student, which timm alone builds too."""
    model = graftvit.load(folder)
    assert torch.equal(logits(timm.create_model(f"local-dir:{folder}", pretrained=True)), logits(model))
    return model


def test_alignment_then_output_matching(teacher: Path, tmp_path: Path) -> None:
    assert train(align(tmp_path / "a", teacher)).finished
    log = read_records(tmp_path / "a" / "log.jsonl")
    losses = [record["train_layer00"] for record in log if "test_top1" in record]
    assert losses[-1] < losses[0]
    aligned, original = graftvit.load(tmp_path / "a" / "student"), graftvit.load(str(teacher))
    assert plan_of(aligned) == "0: linear; 1: softmax"
    parameters = aligned.named_parameters()
    changed = {name for name, tensor in parameters if not torch.equal(tensor, original.get_parameter(name))}
    assert changed == {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}

    student = {"model": f"local-dir:{tmp_path / 'a' / 'student'}", "model_args": {}, "drop_path": 0.0}
    transfer = {"method": "attention_output", "weight": 50.0, "reduction": "mean"}
    assert train(config(tmp_path / "c", teacher, student=student, transfer=transfer)).finished
    assert plan_of(graftvit.load(str(tmp_path / "c" / "student_ema"))) == plan_of(aligned)
    assert "train_layer00" in read_records(tmp_path / "c" / "log.jsonl")[-1]


def test_an_alignment_goes_on_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    """Probes are drawn anew in every step, so the generators are put back too."""
    how = {"align": {"match": "probes"}, "engine": {"save_every": 5}}
    resume_cut(lambda folder: align(folder, teacher, **how), tmp_path)


def test_a_converted_student_from_scratch(tmp_path: Path) -> None:
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS, "plan": PLAN}
    assert train(config(tmp_path, student=student)).finished
    assert plan_of(graftvit.load(str(tmp_path / "student"))) == "0: linear; 1: softmax"


def test_what_is_missing_is_said(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode=align needs a teacher"):
        train(config(tmp_path, None, mode="align"))
    with pytest.raises(TransferError, match="no layer of the student is converted"):
        train(align(tmp_path, teacher, student={"plan": None}))


def convolutions(run: RunConfig, model: nn.Module | None = None) -> list[torch.Tensor]:
    """Convolutions of the programs of a model, by default of the run before its first step."""
    named = (model or build(run).task.trainable).named_parameters()
    return [tensor for name, tensor in named if ".operator.conv." in name]


@pytest.mark.parametrize("mode", ["scratch", "finetune"])
@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_programs_start_with_convolutions_where_they_are_fresh(kind: str, mode: str, tmp_path: Path) -> None:
    """A converted pyramid starts without its convolutions and learns them."""
    source = write_pyramid(tmp_path / "teacher", kind) if mode == "finetune" else None
    student = PROGRAMS | ({"init": "teacher"} if source else {})
    run = pyramid(tmp_path / "run", kind, student, source, mode=mode)
    assert {bool(tensor.any()) for tensor in convolutions(run)} == {mode == "scratch"}
    train(run)
    model = loaded(tmp_path / "run" / "student")
    assert all(tensor.any() for tensor in convolutions(run, model))
    assert str(plan_of(model)).startswith("0: attnzero_105; ")
    assert [layer.choice for layer in converted_layers(model).values()][1].options == {"code": CODE}


@pytest.mark.parametrize(
    "kind", ["pvt", "swin", *(pytest.param(x, marks=pytest.mark.slow) for x in ("svt", "swinv2"))]
)
def test_a_pyramid_is_trained_resumed_and_loaded_by_timm(kind: str, tmp_path: Path) -> None:
    whole = resume_cut(lambda folder: pyramid(folder, kind), tmp_path)
    assert image_size(loaded(whole / "student_ema")) == (32, 32)
    started = build(pyramid(tmp_path / "other", kind, student={"init": str(whole)}))
    assert torch.equal(logits(started.task.trainable), logits(graftvit.load(whole)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_drops_from_the_weights_what_its_operators_do_not_need(kind: str, tmp_path: Path) -> None:
    """The student starts as the conversion of the teacher, and its folder builds it again."""
    source, plan = (
        write_pyramid(tmp_path / "teacher", kind),
        "0: none; 1: uniform; stage2.0: softmax; stage2.1: linear",
    )
    student = {"init": "teacher", "plan": plan, "without": ["bias"]}
    run = pyramid(tmp_path / "run", kind, student, source, mode="finetune")
    started = build(run).task.trainable.state_dict()
    expected = convert(tiny(kind, num_classes=10), plan, without=["bias"])
    for name, tensor in expected.state_dict().items():
        assert name.startswith("head.") or torch.equal(started[name], tensor), name
    assert build(run, weights=False).plan.meta() == build(run).plan.meta()
    train(run)
    assert plan_of(loaded(tmp_path / "run" / "student")) == plan_of(expected)


@pytest.mark.parametrize("kind", TINY)
def test_fresh_merges_join_the_weights_of_the_teacher(kind: str, tmp_path: Path) -> None:
    pool = {"global_pool": "token"} if kind == "pvt1" else {}  # it has a class token
    student = {"init": "teacher", "plan": "stage1: none; merge: deformable", **pool}
    run = pyramid(tmp_path / "run", kind, student, write_pyramid(tmp_path / "teacher", kind), mode="finetune")
    assert "merge: deformable" in describe_plan(run)
    started, own = build(run).task.trainable, tiny(kind, num_classes=10).state_dict()
    merges = tuple(deformable_merges(started))
    assert merges
    for name, tensor in started.state_dict().items():
        assert name.startswith((*merges, "head.")) or torch.equal(own[name], tensor), name
    tensors = {key: value.contiguous() for key, value in started.state_dict().items()}
    del tensors[f"{merges[0]}.norm_layer.bias"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="missing keys"):
        load_weights(started, str(tmp_path / "half.safetensors"))


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_recomputed_activations_do_not_change_the_gradients(kind: str, tmp_path: Path) -> None:
    gradients = []
    for again in (False, True):
        parts = build(pyramid(tmp_path, kind, student={"grad_checkpointing": again}))
        torch.manual_seed(0)
        parts.task(images((32, 32)), torch.tensor([1, 2]))["loss"].backward()
        gradients.append([parameter.grad for parameter in parts.task.trainable.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_shards_a_pyramid_block_by_block(kind: str, tmp_path: Path) -> None:
    task = build(pyramid(tmp_path, kind)).task
    student = task.trainable
    assert [id(unit) for unit in task.shard_units] == [id(site.block(student)) for site in sites(student)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_plain_transformers_refuses_by_name(kind: str, tmp_path: Path) -> None:
    source, name = write_pyramid(tmp_path / "teacher", kind), type(tiny(kind)).__name__
    with pytest.raises(ConfigError, match=f"student.model={TINY[kind][0]} is a pyramid"):
        build(pyramid(tmp_path, kind, mode="pretrain"))
    with pytest.raises(UnsupportedModelError, match=f"mirror_teacher=true: {name} is a pyramid"):
        build(pyramid(tmp_path, kind, {"mirror_teacher": True}, source), weights=False)
    for method, weights in (("copy", False), ("copy_v", True)):
        with pytest.raises(TransferError, match=f"{name} is a pyramid; use distill"):
            build(pyramid(tmp_path / "run", kind, None, source, transfer={"method": method}), weights=weights)


def test_what_a_pyramid_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grad_checkpointing=true: timm's Twins cannot recompute"):
        build(pyramid(tmp_path, "svt", student={"grad_checkpointing": True}))
    with pytest.raises(UnsupportedModelError, match="images of 6x6 leave no token in stage 2"):
        build(pyramid(tmp_path, "svt", student={"img_size": 6}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pvt1", *KINDS])
def test_linear_attention_trains_saves_loads_and_resizes(kind: str, tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    train(pyramid(tmp_path / "run", kind, student={"plan": "*: linear", "without": ["bias"]}))
    assert plan_of(graftvit.load(student)) == "*: linear"
    assert main(["checkpoint", "save", str(student), str(tmp_path / "bigger"), "--img_size", "48,40"]) == 0
    bigger, again = graftvit.load(student, img_size=(48, 40)), graftvit.load(tmp_path / "bigger")
    assert image_size(again) == (48, 40)
    with torch.no_grad():
        assert torch.equal(again(images((48, 40))), bigger(images((48, 40))))


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_run_says_that_a_bias_which_the_student_lacks_is_not_given_up(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(pyramid(tmp_path, kind, student={"plan": "stage2: linear", "without": ["bias"]}))
    note = f"student.without=bias gives up nothing, because {type(tiny(kind)).__name__} has no relative"
    assert (note in caplog.text) == (kind == "pvt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student", "transfer"),
    [
        ("swin", "pvt", {"method": "attention_output"}),
        ("svt", "swinv2", {"method": "block_output", "layers": "stage1>stage1,stage2>stage2"}),
        ("pvt", "svt", {"method": "distill", "layers": "0>1,1>3"}),
        ("swinv2", "swin", {"method": "feature", "tokens": "both"}),
    ],
)
def test_a_pyramid_learns_from_another(
    teacher: str, student: str, transfer: dict[str, Any], tmp_path: Path
) -> None:
    source = write_pyramid(tmp_path / "teacher", teacher)
    make = lambda folder: pyramid(folder, student, None, source, transfer=transfer)  # noqa: E731
    assert dry_run(make(tmp_path / "planned"), 1, here=True).footprint.student
    whole = resume_cut(make, tmp_path)
    assert any(name.startswith(("train_layer", "train_feature")) for name in records(whole)[-1])
    loaded(whole / "student")


CONVERTED = {"plan": "0: none; stage2.0: softmax; stage2.1: linear", "init": "teacher"}
WINDOWS = {"plan": "0: none; stage1.1: softmax; stage2: linear", "init": "teacher", "without": ["bias"]}
OUTPUTS = {"method": "attention_output", "layers": "stage2>stage2"}


@pytest.mark.slow
@NEEDS_FSDP
@pytest.mark.parametrize(
    ("teacher", "student", "transfer", "converted"),
    [
        ("swin", "pvt", OUTPUTS, {}),
        ("pvt", "svt", {"method": "distill", "layers": "0>1,1>3"}, {}),
        ("swin", "swin", OUTPUTS, WINDOWS),
        ("pvt", "pvt", OUTPUTS, CONVERTED),
    ],
)
def test_two_processes_give_the_numbers_of_one(
    run_scenario: RunScenario,
    tmp_path: Path,
    teacher: str,
    student: str,
    transfer: Any,
    converted: dict[str, Any],
) -> None:
    """Replicated and sharded; the student of each run is loaded."""
    report = run_scenario("engine_pyramid", tmp_path, teacher, student, transfer, converted)
    assert report["ends"] == [[0], [0, 0], [0, 0]], report
    assert max(report["gaps"]) < 1e-4, report
    plan = None
    if converted:
        plan = str(plan_of(convert(tiny(student), converted["plan"], without=converted.get("without", []))))
    assert report["plans"] == [plan] * 3


@pytest.mark.slow
def test_windows_teach_all_tokens_and_a_plain_teacher_teaches_a_stage(
    tmp_path: Path,
) -> None:
    source, plan = write_pyramid(tmp_path / "swin", "swin"), "stage1: softmax"
    student = {"plan": plan, "init": "teacher"}
    transfer = {"method": "distill", "layers": "stage1"}
    train(pyramid(tmp_path / "windows", "swin", student, source, transfer=transfer))
    assert plan_of(graftvit.load(tmp_path / "windows" / "student")) == plan_of(convert(tiny("swin"), plan))
    plain = make_teacher(tmp_path / "plain")
    large = {"source": f"local-dir:{plain}", "img_size": 32}
    transfer = {"method": "attention_output", "layers": "stage1>stage1"}
    student = {"model_args": {**TINY["svt"][1], "in_chans": 1}}
    assert train(
        pyramid(tmp_path / "stage", "svt", student, plain, teacher=large, transfer=transfer)
    ).finished


def test_the_plan_of_a_run_says_how_the_stages_differ(tmp_path: Path) -> None:
    source = write_pyramid(tmp_path / "teacher", "swin")
    run = pyramid(tmp_path / "run", "pvt", None, source, transfer={"method": "attention_output"})
    task: Any = build(run, weights=False).task
    said = task.dual.describe()
    assert "layers (teacher>student): 1>0, 2>1, 3>2" in said
    assert "3x3 windows or 3x3 shifted windows, 3x3 windows or 3x3 shifted windows  keys of 2x2, all" in said


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for name, each in state(folder).items() if ".operator." in name and "student" in name}


def test_a_student_of_its_teacher_is_fitted_to_the_teachers_inputs(teacher: Path, tmp_path: Path) -> None:
    run = hashed(tmp_path / "run", teacher, init="teacher")
    assert train(run).finished
    source = load_pretrained(f"local-dir:{teacher}")
    shown = sample_images(run.data, source.preprocessing, 9, seed=run.seed)
    wanted = convert(source.model, HASHED, calibration=shown, seed=run.seed)
    found = codes_of(tmp_path / "run")
    assert len(found) == 2 * 4  # with the mark of the operator
    for index, layer in converted_layers(wanted).items():
        for name, tensor in layer.operator.state_dict().items():
            [own] = [value for key, value in found.items() if key.endswith(f"{index}.attn.operator.{name}")]
            torch.testing.assert_close(own, tensor)
    assert graftvit.load(str(tmp_path / "run" / "student"))(shown).isfinite().all()
    assert (tmp_path / "run" / "fit" / "layer01.safetensors").exists()


def test_a_fresh_student_is_fitted_to_its_own_inputs_and_not_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert train(hashed(tmp_path / "first", None)).finished
    assert "fit of layer 1 on 9 images: objective " in caplog.text
    assert all(tensor.any() for tensor in codes_of(tmp_path / "first").values())
    assert not (tmp_path / "first" / "fit").exists()
    again = hashed(tmp_path / "again", None, calibrate=0, init=str(tmp_path / "first" / "student"))
    assert "hash" in describe_plan(again)
    assert train(again).finished


@pytest.mark.parametrize("start", [None, "teacher"])
def test_a_run_without_a_fit_is_refused_and_so_is_its_dry_run(
    start: str | None, teacher: Path, tmp_path: Path
) -> None:
    run = hashed(tmp_path, teacher, calibrate=0, init=start)
    for begin in (train, describe_plan):
        with pytest.raises(UnsupportedModelError, match=r"student\.calibrate=N"):
            begin(run)


def test_a_resumed_run_is_not_fitted_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_fit = lambda: monkeypatch.setattr(HashAttention, "fit", None)  # noqa: E731
    resume_cut(lambda folder: hashed(folder, teacher, 5, init="teacher"), tmp_path, no_fit)


def test_a_stop_during_the_fit_keeps_the_layers_that_are_fitted(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, fits = HashAttention.fit, list[int]()

    def stopping(self: HashAttention, *given: Any, **named: Any) -> Any:
        fits.append(named["seed"])
        if len(fits) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return fit(self, *given, **named)

    train(hashed(tmp_path / "whole", teacher, init="teacher"))
    monkeypatch.setattr(HashAttention, "fit", stopping)
    ended = train(hashed(tmp_path / "cut", teacher, init="teacher"))
    assert (ended.signal, ended.steps, len(fits)) == (signal.SIGUSR2, 0, 1)
    early_signals.received.clear()
    assert train(hashed(tmp_path / "cut", teacher, init="teacher")).finished
    assert len(fits) == len(set(fits)) == 2, "no layer is fitted twice"
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_every_process_has_the_fit_of_the_first(run_scenario: RunScenario, tmp_path: Path) -> None:
    """Also where another one rounds differently; and the number of processes does not matter."""
    report = run_scenario("engine_fitting", str(tmp_path))
    assert report["ends"] == [0, 0, 0], report["stderr"]
    assert len(report["fits"]) == 3
    assert len(set(report["fits"])) == 1
