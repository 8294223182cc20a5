"""Runs of pyramids on labels: trained, cut and resumed, saved, and loaded by timm alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_weights
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.launch.plan_text import describe_plan
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import CheckpointError, ConfigError, UnsupportedModelError
from graftvit.models.families import image_size, sites
from graftvit.models.merges import deformable_merges
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.train import train
from safetensors.torch import save_file
from support.models.pyramids import TINY, arguments, images, tiny
from support.runs.engine_runs import config, differences

KINDS = ("pvt", "svt", "swin", "swinv2")


def pyramid(output_dir: Path, kind: str, student: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """Four steps of a tiny pyramid of the kind on digits of 32x32."""
    model = {"model": TINY[kind][0], "model_args": TINY[kind][1], "img_size": 32, **(student or {})}
    short = {"optim": {"max_steps": 4, "warmup_epochs": 0}, "data": {"batch_size": 8, "train_samples": 40}}
    return config(output_dir, student=model, **{**short, **sections})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images((32, 32)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", ["pvt", "swin", *(pytest.param(x, marks=pytest.mark.slow) for x in ("svt", "swinv2"))]
)
def test_a_pyramid_is_trained_resumed_and_loaded_by_timm(kind: str, tmp_path: Path) -> None:
    train(pyramid(tmp_path / "whole", kind, engine={"save_every": 2}))
    train(pyramid(tmp_path / "cut", kind, engine={"save_every": 2}))
    (tmp_path / "cut" / "checkpoints" / "last.safetensors").unlink()
    train(pyramid(tmp_path / "cut", kind, engine={"save_every": 2}))
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    folder = tmp_path / "whole" / "student_ema"
    loaded = graftvit.load(folder)
    assert image_size(loaded) == (32, 32)
    assert torch.equal(logits(timm.create_model(f"local-dir:{folder}", pretrained=True)), logits(loaded))
    started = build(pyramid(tmp_path / "other", kind, student={"init": str(tmp_path / "whole")}))
    assert torch.equal(logits(started.task.trainable), logits(graftvit.load(tmp_path / "whole")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_drops_from_the_weights_what_its_operators_do_not_need(kind: str, tmp_path: Path) -> None:
    """The student starts as the conversion of the teacher, and its folder builds it again."""
    teacher = tiny(kind, num_classes=10)
    how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
    shown = Preprocessing.of(teacher, input_size=(3, 32, 32))
    write_student(teacher, tmp_path / "teacher", **how, preprocessing=shown)
    plan = "0: none; 1: uniform; stage2.0: softmax; stage2.1: linear"
    student = {"init": "teacher", "plan": plan, "without": ["bias"]}
    run = pyramid(
        tmp_path / "run", kind, student, mode="finetune", teacher={"source": str(tmp_path / "teacher")}
    )
    started = build(run).task.trainable
    expected = convert(teacher, plan, without=["bias"])
    head = {name for name in expected.state_dict() if name.startswith("head.")}
    for name, tensor in expected.state_dict().items():
        assert name in head or torch.equal(started.state_dict()[name], tensor), name
    assert build(run, weights=False).plan.meta() == build(run).plan.meta()
    train(run)
    loaded = graftvit.load(tmp_path / "run" / "student")
    assert plan_of(loaded) == plan_of(expected)
    again = timm.create_model(f"local-dir:{tmp_path / 'run' / 'student'}", pretrained=True)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("kind", TINY)
def test_fresh_merges_join_the_weights_of_the_teacher(kind: str, tmp_path: Path) -> None:
    teacher = tiny(kind, num_classes=10)
    how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
    shown = Preprocessing.of(teacher, input_size=(3, 32, 32))
    write_student(teacher, tmp_path / "teacher", **how, preprocessing=shown)
    pool = {"global_pool": "token"} if kind == "pvt1" else {}  # it has a class token
    run = pyramid(
        tmp_path / "run",
        kind,
        {"init": "teacher", "plan": "stage1: none; merge: deformable", **pool},
        mode="finetune",
        teacher={"source": str(tmp_path / "teacher")},
    )
    assert "merge: deformable" in describe_plan(run)
    started, own = build(run).task.trainable, teacher.state_dict()
    merges = tuple(deformable_merges(started))
    assert merges
    for name, tensor in started.state_dict().items():
        fresh = name.startswith((*merges, "head."))
        assert fresh or torch.equal(own[name], tensor), name
    with pytest.raises(CheckpointError, match="missing keys"):
        load_weights(started, _half(started, tmp_path))


def _half(model: torch.nn.Module, folder: Path) -> str:
    """Return a file of weights that lack one tensor of a deformable merge."""
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    del tensors[f"{next(iter(deformable_merges(model)))}.norm_layer.bias"]
    save_file(tensors, folder / "half.safetensors")
    return str(folder / "half.safetensors")


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_recomputed_activations_do_not_change_the_gradients(kind: str, tmp_path: Path) -> None:
    gradients = []
    for again in (False, True):
        parts = build(pyramid(tmp_path, kind, student={"grad_checkpointing": again}))
        torch.manual_seed(0)
        parts.task(images((32, 32)), torch.tensor([1, 2]))["loss"].backward()
        gradients.append([parameter.grad for parameter in parts.task.trainable.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_twins_cannot_recompute_activations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grad_checkpointing=true: timm's Twins cannot recompute"):
        build(pyramid(tmp_path, "svt", student={"grad_checkpointing": True}))


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_shards_a_pyramid_block_by_block(kind: str, tmp_path: Path) -> None:
    task = build(pyramid(tmp_path, kind)).task
    student = task.trainable
    assert [id(unit) for unit in task.shard_units] == [id(site.block(student)) for site in sites(student)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_plain_transformers_refuses_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"student.model={TINY[kind][0]} is a pyramid"):
        build(pyramid(tmp_path, kind, mode="pretrain"))
    mirrored = pyramid(tmp_path, kind).model_copy(update={"mode": "transfer"})
    name = type(tiny(kind)).__name__
    words = {"teacher": {"source": TINY[kind][0]}, "student": {"mirror_teacher": True}}
    with pytest.raises(UnsupportedModelError, match=f"mirror_teacher=true: {name} is a pyramid"):
        build(RunConfig.model_validate(_merged(mirrored, words)), weights=False)


def test_an_image_that_leaves_a_stage_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="images of 6x6 leave no token in stage 2"):
        build(pyramid(tmp_path, "svt", student={"img_size": 6}))


def _merged(run: RunConfig, words: dict[str, dict[str, Any]]) -> dict[str, Any]:
    settings = run.model_dump()
    return settings | {name: settings[name] | values for name, values in words.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pvt1", *KINDS])
def test_linear_attention_everywhere_trains_saves_loads_exports_and_resizes(
    kind: str, tmp_path: Path
) -> None:
    run, exported = tmp_path / "run", tmp_path / "model.pt2"
    train(pyramid(run, kind, student={"plan": "*: linear", "without": ["bias"]}))
    student = graftvit.load(run / "student")
    assert plan_of(student) == "*: linear"
    assert main(["export", str(run / "student"), str(exported)]) == 0
    program = torch.export.load(exported).module()
    torch.testing.assert_close(program(images((32, 32))), logits(student), rtol=1e-3, atol=1e-4)
    bigger = graftvit.load(run / "student", img_size=(48, 40))
    assert (
        main(["checkpoint", "save", str(run / "student"), str(tmp_path / "bigger"), "--img_size", "48,40"])
        == 0
    )
    again = graftvit.load(tmp_path / "bigger")
    assert image_size(again) == (48, 40)
    with torch.no_grad():
        assert torch.equal(again(images((48, 40))), bigger(images((48, 40))))


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_run_says_that_a_bias_which_the_student_lacks_is_not_given_up(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(pyramid(tmp_path, kind, student={"plan": "stage2: linear", "without": ["bias"]}))
    name = type(tiny(kind)).__name__
    note = (
        f"student.without=bias gives up nothing, because {name} has no relative position bias: leave it out"
    )
    assert (note in caplog.text) == (kind == "pvt")
