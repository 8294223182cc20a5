"""The plan of a dry run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.launch.load_config import load_config
from graftvit.launch.plan_text import describe_memory, describe_plan, memory_items, parameter_count
from graftvit.models.errors import ConfigError, GraftError, TransferError
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.dry_run import DryRun, dry_run
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder
from support.models.saved import save_vit
from support.models.tiny_weights import write_stand_in
from support.runs.engine_runs import ARGUMENTS
from support.runs.engine_runs import config as short_run
from support.runs.typed import Typed

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
STUDENT = [
    "student.model=vit_tiny_patch16_224",
    *(f"student.model_args.{name}={value}" for name, value in SMALL.items() if name != "img_size"),
    "student.img_size=16",
    "device=cpu",
    "workers=0",
]


def rows(plan: str) -> dict[str, str]:
    """The plan as name -> words; lines that go on are joined."""
    found: dict[str, str] = {}
    name = ""
    for line in plan.splitlines():
        head, words = line[:15].strip(), line[15:]
        name = head or name
        found[name] = f"{found[name]}\n{words}" if name in found else words
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    return f"local-dir:{save_vit(folder, SMALL | {'num_classes': 0, 'in_chans': 3})}"


def test_the_published_recipe_is_planned_without_data_or_weights() -> None:
    plan = rows(describe_plan(load_config("attention_distill_vit_large", ["device=cpu"])))
    assert "weights not read" in plan["teacher"]
    assert "vit_large_patch16_224" in plan["student"]
    assert "1000 classes" in plan["student"]
    assert "0>0" in plan["transfer"]
    assert "17>17" in plan["transfer"]
    assert "18>18" not in plan["transfer"]
    assert "heads: all 16" in plan["transfer"]
    assert "loss: 3 x the sum over 18 layers" in plan["transfer"]
    assert plan["trained"] == "304,326,632 of 304,326,632 parameters"
    assert "data.data_path" in plan["data"]
    batch, note = plan["batch"].splitlines()
    assert batch == "32 x 1 accumulated x 1 process = 32 images"
    assert note.endswith("the learning rate is 1.25e-05, and the recipe's 0.0008; --accum_iter 64 keeps both")
    assert "200 epochs" in plan["length"]
    assert "activations" in plan["memory"]


def test_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    plan = rows(describe_plan(load_config("attention_distill_vit_base")))
    assert plan["batch"].endswith("64 processes = 2048 images")
    assert plan["learning rate"].startswith("0.0008 (blr 0.0001 x 2048 / 256), down to 1e-06")


@pytest.mark.parametrize("method", ["distill", "copy", "copy_q", "distill_v", "block_output", "logits"])
def test_the_plan_is_that_of_the_run(method: str, teacher: str, tmp_path: Path) -> None:
    overrides = [
        *STUDENT, "dataset=digits", f"teacher={teacher}", f"method={method}", "layers=last:2",
        f"output_dir={tmp_path / 'run'}", "batch_size=50", "train_samples=200", "epochs=3", "warmup_epochs=1",
    ]  # fmt: skip
    config = load_config(None, overrides)
    if method == "logits":
        with pytest.raises(GraftError):
            describe_plan(config)
        return
    plan = rows(describe_plan(config))
    parts = build(config)
    trained = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    count = sum(p.numel() for p in parts.task.parameters())
    assert plan["trained"] == f"{trained:,} of {count:,} parameters"
    assert "2>2, 3>3" in plan["transfer"]
    assert plan["data"] == "200 training images, 10 classes"
    assert plan["length"] == "12 steps, 4 an epoch, 4 of them warm-up"
    assert ("the part of its teacher" in plan["transfer"]) == method.startswith("copy")
    assert not (tmp_path / "run").exists(), "a plan leaves nothing behind"


@pytest.mark.parametrize("mode", ["scratch", "finetune", "pretrain"])
def test_modes_without_transfer(mode: str, teacher: str) -> None:
    own = {"finetune": ["init=" + teacher], "pretrain": ["decoder_dim=16", "decoder_heads=2"]}.get(mode, [])
    config = load_config(None, [*STUDENT, *own, f"mode={mode}", "dataset=digits"])
    plan = rows(describe_plan(config))
    assert "transfer" not in plan
    trained = sum(p.numel() for p in build(config).task.parameters() if p.requires_grad)
    assert plan["trained"].startswith(f"{trained:,} of ")
    assert ("no head" in plan["student"]) == (mode == "pretrain")


def test_the_plan_of_an_alignment_names_what_learns_and_from_what(teacher: str) -> None:
    words = [
        f"model={teacher}",
        "mode=align",
        f"teacher={teacher}",
        "plan=*: linear; 0: softmax",
        "match=map",
    ]
    more = [r"scales={'\.operator\.': 5}", "dataset=digits", "device=cpu"]
    plan = rows(describe_plan(load_config(None, [*words, *more])))
    assert "vit_tiny_patch16_224 converted by '*: linear; 0: softmax'" in plan["student"]
    assert plan["alignment"].startswith("layers 1, 2, 3 learn")
    assert "match=map: the attention map, exactly" in plan["alignment"]
    assert r"x 5 for '\\.operator\\.'" in plan["learning rate"]


def test_the_plan_adds_the_losses_of_a_feature_and_notes_a_teacher_of_no_weight(teacher: str) -> None:
    def transfer(weight: float) -> str:
        feature = f"{{method: feature, tokens: both, weight: {weight}}}"
        losses = f"losses=[{feature}, {{method: distill, weight: 0}}]"
        overrides = [*STUDENT, f"teacher={teacher}", "dataset=digits", losses]
        return rows(describe_plan(load_config(None, overrides)))["transfer"]

    assert "loss feature: 2 x (feature + patches)\n" in transfer(2)
    assert "loss distill: 0 x the sum over 4 layers" in transfer(2)
    assert "no teacher teaches" not in transfer(2)
    assert "no teacher teaches" in transfer(0)


@pytest.mark.parametrize(
    ("words", "loss"),
    [(["reduction=mean"], "3 x the mean over 4 layers"), (["layers=last:1"], "3 x the loss of one layer"),
     (["method=feature"], "3 x feature")],
)  # fmt: skip
def test_the_plan_counts_the_layers_of_a_loss(words: list[str], loss: str, teacher: str) -> None:
    overrides = [*STUDENT, f"teacher={teacher}", "dataset=digits", *words]
    plan = rows(describe_plan(load_config(None, overrides)))
    assert f"loss: {loss}" in plan["transfer"].splitlines()


def test_a_teacher_from_which_nothing_starts_is_refused(teacher: str) -> None:
    words = [*STUDENT, "mode=finetune", f"teacher={teacher}", "dataset=digits"]
    with pytest.raises(ConfigError, match=r"teacher\.source=.* changes nothing with mode=finetune"):
        describe_plan(load_config(None, [*words, "init=vit_tiny_patch16_224"]))
    assert describe_plan(load_config(None, words)) == describe_plan(
        load_config(None, [*words, "init=teacher"])
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dataset=digits", "stage=/tmp"], "data.dataset=digits has no files"),
        (["stage=/proc/none/of"], "data.stage=/proc/none/of cannot be written"),
        (["stage=$NO_SUCH_DISK"], "NO_SUCH_DISK is not set"),
    ],
)
def test_a_folder_that_cannot_hold_a_copy_is_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    if "dataset=digits" not in words:
        words = [f"data_path={class_folder(tmp_path)}", *words]
    config = load_config(None, [*STUDENT, "mode=scratch", *words])
    with pytest.raises(GraftError) as refused:
        describe_plan(config)
    assert sentence in str(refused.value)
    if "digits" not in sentence:
        describe_plan(config, processes=1)  # another machine may have it


def test_frozen_parameters_are_not_trained(teacher: str) -> None:
    overrides = [*STUDENT, f"teacher={teacher}", "dataset=digits", r"trainable=blocks\.3"]
    plan = rows(describe_plan(load_config(None, overrides)))
    trained, count = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", plan["trained"]))
    assert 0 < trained < count / 2


def test_matched_heads_are_said_to_come_from_the_first_batch(teacher: str) -> None:
    overrides = [*STUDENT, f"teacher={teacher}", "dataset=digits", "heads=match"]
    assert "matched on the first batch" in describe_plan(load_config(None, overrides))


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan = rows(describe_plan(load_config("cifar10_copy")))
    assert plan["data"].startswith("not read: ")
    assert "10 classes" in plan["student"]
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize(
    ("optim", "taken"),
    [
        ({"warmup_epochs": 1.9}, ""),
        ({"warmup_epochs": None}, "a tenth of the run"),
        ({"warmup_epochs": 1, "max_steps": 7}, "a tenth of the run, as optim.warmup_epochs=1"),
    ],
)
def test_the_plan_says_which_warm_up_it_takes(optim: dict[str, Any], taken: str, tmp_path: Path) -> None:
    _, _, words = rows(describe_plan(short_run(tmp_path, optim=optim)))["length"].partition("warm-up")
    assert words.startswith(f" ({taken}") if taken else words == ""
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs=2.0 is not below optim.epochs=2"):
        describe_plan(short_run(tmp_path, optim={"warmup_epochs": 2}))


BEGUN = {"accum_iter": 2, "max_steps": 3}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, which plans only read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(short_run(folder, optim=BEGUN))
    return folder


def test_a_run_that_goes_on_keeps_its_batch(begun: Path) -> None:
    longer = short_run(begun, optim={**BEGUN, "max_steps": 9})
    plan = rows(describe_plan(longer, 2))
    assert plan["batch"] == "16 x 1 accumulated x 2 processes = 32 images"
    assert plan["learning rate"].startswith("0.00375 (blr 0.03 x 32 / 256)")
    assert plan["length"].startswith("9 steps, 4 an epoch")
    assert plan["resumes"].splitlines() == [
        "after step 3",
        "changed: optim.max_steps 3 -> 9",
        "continues on 2 processes with 1 batch a step in place of 1 with 2; the global batch stays 32",
    ]
    assert rows(describe_plan(longer))["resumes"].startswith("after step 3\nchanged")
    assert rows(describe_plan(short_run(begun, optim=BEGUN)))["resumes"].startswith("no: ")


@pytest.mark.parametrize(
    ("processes", "sections", "sentence"),
    [
        (3, {}, "which 3 processes cannot share: use 1 or 2 processes"),
        (1, {"optim": {"accum_iter": 2, "max_steps": 2}}, "asks for 2 steps, but the run has done 3 already"),
        (1, {"seed": 5}, "seed=5, but the run in .* was started with 0"),
        (1, {"engine": {"device": "cpu", "resume": "never"}}, "already holds a run"),
    ],
)
def test_what_cannot_go_on_is_refused_before_it_runs(
    processes: int, sections: dict[str, Any], sentence: str, begun: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        describe_plan(short_run(begun, **{"optim": BEGUN, **sections}), processes)


def test_without_data_the_classes_must_be_known(teacher: str) -> None:
    with pytest.raises(GraftError, match="data_path"):
        describe_plan(load_config(None, [*STUDENT, f"teacher={teacher}"]))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "--dry_run"], "teacher.source"),
        (["train", "cifar10_copy", "--dry_run", "--model", "vit_tiny_patch16_224"], "transfer.heads"),
        (["train", "cifar10_copy", "--dry_run", "--layers", "first:99"], "first:99"),
        (["train", "cifar10_copy", "--dry_run", "--model", "vit_smal"], "vit_smal"),
        (["train", "cifar10_copy", "--dry_run", "--teacher", "vit_smal.dino"], "vit_smal"),
        (["train", "cifar10_copy", "--dry_run", "--teacher.img_size", "224"], "patch grid"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], part: str, typed: Typed) -> None:
    captured = typed(*words, code=2)
    assert captured.out == ""
    assert captured.err.startswith("graftvit: error: ")
    assert part in captured.err


DINOV3 = {"img_size": 64, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}


@pytest.fixture
def free(tmp_path: Path) -> str:
    """A teacher that takes any image size; its folder says nothing of 8 pixels a side."""
    return write_stand_in("vit_small_patch16_dinov3.lvd1689m", tmp_path / "dinov3", DINOV3, 0)


@pytest.mark.parametrize(
    ("size", "grid"),
    [([], (4, 4)), (["teacher.img_size=32"], (8, 8)), (["teacher.model_args.img_size=32"], (8, 8))],
)
def test_the_size_of_a_teacher_that_takes_any(
    size: list[str], grid: tuple[int, int], free: str, tmp_path: Path
) -> None:
    overrides = [
        *STUDENT, "dataset=digits", f"teacher={free}", "method=feature", f"output_dir={tmp_path / 'run'}", *size,
    ]  # fmt: skip
    plan = rows(describe_plan(load_config(None, overrides)))["transfer"]
    dual: Any = build(load_config(None, overrides)).task.dual  # type: ignore[attr-defined]
    images = torch.randn(2, 3, 16, 16)
    assert dual.teacher_input.grids(images, None).teacher == (grid,)
    assert dual.teacher_input(images).shape[-2:] == tuple(4 * side for side in grid)
    assert ("resized to (32, 32)" in plan) == bool(size)
    assert ("resized to (32, 32)" in dual.describe()) == bool(size)
    if not size:
        return
    copying = load_config(None, [*overrides, "method=copy"])
    sentences = []
    for attempt in (describe_plan, build):
        with pytest.raises(TransferError, match="patch grid is 8x8 and the student's 4x4") as refused:
            attempt(copying)
        sentences.append(str(refused.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize("mode", ["scratch", "transfer"])
def test_a_student_that_takes_any_size_needs_whole_patches(mode: str, teacher: str, tmp_path: Path) -> None:
    overrides = [
        *STUDENT, "dataset=digits", f"mode={mode}", "student.model_args.dynamic_img_size=true", "student.img_size=18",
        f"output_dir={tmp_path / 'run'}", *([f"teacher={teacher}"] if mode == "transfer" else []),
    ]  # fmt: skip
    for attempt in (describe_plan, build):
        with pytest.raises(GraftError, match="images of 18x18 are not whole patches of 4x4"):
            attempt(load_config(None, overrides))
    with pytest.raises(GraftError, match="images of 18x18 are not whole patches of 4x4"):
        load_pretrained(teacher, img_size=18, model_args={"dynamic_img_size": True})


def test_a_teacher_of_another_grid_is_refused_before_alignment(teacher: str, tmp_path: Path) -> None:
    overrides = [
        *STUDENT, "dataset=digits", f"teacher={teacher}", "mode=align", "plan=*: linear", "teacher.img_size=32",
        f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    for attempt in (describe_plan, build):
        with pytest.raises(TransferError, match=r"cls \+ 8x8"):
            attempt(load_config(None, overrides))


def test_a_timm_teacher_without_its_weights_has_no_memory() -> None:
    outlined = load_pretrained("vit_huge_patch14_224.mae", img_size=224, download=False)
    assert sum(p.numel() for p in outlined.model.parameters()) == 630_764_800
    assert all(p.is_meta and not p.requires_grad for p in outlined.model.parameters())
    assert not outlined.has_head
    assert not outlined.model.training


def test_a_timm_teacher_without_its_weights_takes_the_students_resolution() -> None:
    resized: Any = load_pretrained("vit_tiny_patch16_224.augreg_in21k", img_size=(64, 96), download=False)
    assert resized.model.patch_embed.grid_size == (4, 6)
    assert resized.has_head
    with pytest.raises(GraftError, match="wrong_argument"):
        load_pretrained("vit_tiny_patch16_224.augreg_in21k", model_args={"wrong_argument": 1}, download=False)


def test_what_torch_cannot_compile_is_refused_by_the_plan_and_the_run(tmp_path: Path, teacher: str) -> None:
    words = [*STUDENT, f"teacher.source={teacher}", f"output_dir={tmp_path / 'run'}", "data.dataset=digits"]
    settings = load_config(None, [*words, "student.compile=true", "student.grad_checkpointing=true"])
    for start in (describe_plan, build):
        with pytest.raises(ConfigError, match=r"does not go with student.grad_checkpointing=true"):
            start(settings)


def run(folder: Path, processes: int = 1, **sections: Any) -> DryRun:
    return dry_run(short_run(folder / "run", **sections), processes, here=False)


def sizes(folder: Path, processes: int = 1, **sections: Any) -> dict[str, int]:
    return {item.name: item.size for item in memory_items(run(folder, processes, **sections))}


def test_what_changes_the_estimate(tmp_path: Path) -> None:
    plain = sizes(tmp_path)
    count = parameter_count(run(tmp_path).parts.task)
    assert plain["student"] == plain["gradients"] == plain["moving average"] == 4 * count
    assert plain["optimizer"] == pytest.approx(8 * count, rel=0.01)
    assert sizes(tmp_path, data={"batch_size": 32})["activations"] == 2 * plain["activations"]
    assert sizes(tmp_path, engine={"precision": "bf16"})["activations"] < plain["activations"]
    assert "moving average" not in sizes(tmp_path, optim={"ema": None})
    deep = {"model_args": {**ARGUMENTS, "patch_size": 2, "depth": 8}}
    whole, saving = (sizes(tmp_path, student={**deep, **more}) for more in ({}, {"grad_checkpointing": True}))
    assert saving["activations"] < 0.5 * whole["activations"]
    # fsdp divides what it shards, and an optimizer of another machine is left out
    plain, sharded = sizes(tmp_path, 4), sizes(tmp_path, 4, engine={"fsdp": True})
    assert sharded["optimizer"] == plain["optimizer"] // 4
    assert sharded["activations"] == plain["activations"]
    assert "optimizer" not in sizes(tmp_path, optim={"opt": "fusedadamw"})


def test_the_table_sums_up(tmp_path: Path) -> None:
    lines = describe_memory(run(tmp_path))
    parts = [float(line.split("MiB")[0].split()[-1]) for line in lines[:-1]]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.3)
    assert "not counted" in lines[-1]
