"""The student of a run, fresh, from weights or copying attention, and what the words for it mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.describe import describe_source
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.checkpoints.provenance import Pretrained
from graftvit.checkpoints.student import save, write_student
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config
from graftvit.models.conversion import converted_layers
from graftvit.models.errors import CheckpointError, ConfigError, GraftError
from graftvit.models.families import pooling_of
from graftvit.transfer.config import RunConfig, StudentConfig
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.build import build, find_start, settle
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.students import input_size, plan_student, resolve_preprocessing
from graftvit.transfer.engine.train import train
from graftvit.transfer.first_checks import check_first
from graftvit.transfer.loss_config import TransferConfig
from graftvit.transfer.metrics.measure import score_models
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher, resume_cut, tiny_vit
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import Tensor


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"model": "vit_base_patch16_224"}, (3, 224, 224)),
        ({"model": "vit_base_patch14_dinov2.lvd142m"}, (3, 518, 518)),
        ({"model": ARCHITECTURE, "img_size": 64}, (3, 64, 64)),
        ({"model": ARCHITECTURE, "img_size": (32, 64), "model_args": {"in_chans": 1}}, (1, 32, 64)),
        ({"model": ARCHITECTURE, "model_args": ARGUMENTS}, (1, 8, 8)),
    ],
)
def test_input_size_is_known_unbuilt(settings: dict[str, object], size: tuple[int, int, int]) -> None:
    assert input_size(StudentConfig.model_validate(settings)) == size


def student_run(**sections: dict[str, object]) -> RunConfig:
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS} | sections.pop("student", {})
    return RunConfig.model_validate({"student": student, **sections})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Pretrained]:
    """Three models of one channel whose images are made in three ways."""
    folder = tmp_path_factory.mktemp("sources")
    made = [make_teacher(folder / str(mean), mean=(mean,), crop_pct=mean) for mean in (0.3, 0.4, 0.5)]
    return [load_pretrained(f"local-dir:{path}") for path in made]


def images_of(config: RunConfig, teacher: Pretrained | None = None) -> Preprocessing:
    start = find_start(mode_of(config))
    return resolve_preprocessing(settle(config, start), start or teacher)


def test_images_are_those_of_the_weights_that_a_student_starts_from(sources: list[Pretrained]) -> None:
    """Settings stand above the weights."""
    teacher, init, whole = sources
    from_init = student_run(student={"init": init.source})
    assert images_of(from_init, teacher) == images_of(from_init) == init.preprocessing
    from_teacher = student_run(student={"init": "teacher"}, teacher={"source": teacher.source})
    assert images_of(from_teacher) == images_of(student_run(), teacher) == teacher.preprocessing
    assert resolve_preprocessing(student_run(), teacher, whole) == whole.preprocessing
    assert [each.preprocessing.crop_pct for each in sources] == [0.3, 0.4, 0.5]
    found = resolve_preprocessing(student_run(data={"crop_pct": 0.8, "crop_mode": "border"}), teacher)
    assert found == replace(teacher.preprocessing, crop_pct=0.8, crop_mode="border")


def test_images_of_fresh_weights_are_those_of_the_architecture_and_named_ones_are_not_downloaded() -> None:
    found, published = resolve_preprocessing(student_run(), None), get_pretrained_cfg(ARCHITECTURE)
    assert (found.input_size, found.mean, found.std) == ((1, 8, 8), published.mean[:1], published.std[:1])
    assert found.crop_pct == published.crop_pct
    name = "vit_base_patch16_224"
    found = images_of(student_run(student={"model": name, "model_args": {}, "init": f"{name}.mae"}))
    assert (found.mean, found.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_what_timm_refuses_is_said_in_one_sentence() -> None:
    config = student_run(student={"model_args": {**ARGUMENTS, "num_heads": 3}})
    plan = plan_student(config.student, 7, None, resolve_preprocessing(config, None))
    with pytest.raises(
        ConfigError, match=r"student.model='vit_tiny_patch16_224' cannot be built with [^\n]*$"
    ):
        plan.create()


@pytest.mark.parametrize("model", ["pit_ti_224", "deit_tiny_distilled_patch16_224"])
def test_a_student_that_pools_a_token_is_told_so(model: str) -> None:
    for arguments, told in (({}, True), ({"depht": 3}, False)):
        config = student_run(
            student={"model": model, "model_args": arguments, "img_size": 224, "global_pool": "avg"}
        )
        plan = plan_student(config.student, 7, None, resolve_preprocessing(config, None))
        with pytest.raises(ConfigError) as error:
            plan.create()
        assert ("student.global_pool=token" in str(error.value)) == told


def test_position_embeddings_start_as_wide_as_asked(tmp_path: Path) -> None:
    widths = {}
    for std in (0.2, None):
        student = {"pos_embed_std": std, "model_args": {**ARGUMENTS, "embed_dim": 192}}
        task = build(config(tmp_path, student=student)).task
        widths[std] = float(task.trainable.get_parameter("pos_embed").detach().std())
    assert widths[0.2] == pytest.approx(0.2, rel=0.1)
    assert widths[None] < 0.03


def test_fresh_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def weights(seed: int, rank: int) -> Tensor:
        torch.rand(rank + 3)
        task = build(config(tmp_path, seed=seed), rank=rank, world_size=2).task
        return task.trainable.get_parameter("blocks.0.attn.qkv.weight")

    assert torch.equal(weights(0, 0), weights(0, 1))
    assert not torch.equal(weights(0, 0), weights(1, 0))


def same(folder: Path, teacher: Path, **student: Any) -> RunConfig:
    """A run whose student is its teacher's model, apart from what `student` sets."""
    made = config(folder, teacher, student={"model": "same", "model_args": {}, **student})
    return made.model_copy(update={"data": made.data.model_copy(update={"mixup": 0.0})})


SHAPE = ("embed_dim", "depth", "num_heads", "patch_size", "reg_tokens", "qk_norm", "in_chans")


def test_a_student_like_its_teacher_is_its_model_with_fresh_weights(tmp_path: Path) -> None:
    teacher = odd_teacher(tmp_path / "teacher")
    loaded = load_pretrained(f"local-dir:{teacher}")
    parts = build(same(tmp_path / "run", teacher))
    plan = parts.plan
    assert (plan.architecture, plan.preprocessing) == (loaded.architecture, loaded.preprocessing)
    shape = {name: loaded.model_args[name] for name in SHAPE}
    assert {name: plan.arguments[name] for name in SHAPE} == shape
    assert (plan.arguments["num_classes"], plan.arguments["img_size"]) == (10, (16, 16))
    student = parts.task.trainable
    assert pooling_of(student) == pooling_of(loaded.model)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(student.get_parameter(name), loaded.model.get_parameter(name))
    given = build(
        same(tmp_path / "run", teacher, model_args={"depth": 1}, img_size=8, global_pool="avg")
    ).plan
    assert {name: given.arguments[name] for name in SHAPE} == {**shape, "depth": 1}
    assert (given.arguments["global_pool"], given.preprocessing.input_size) == ("avg", (1, 8, 8))


def test_a_student_like_its_teacher_is_resumed_and_repeated_from_its_config(tmp_path: Path) -> None:
    teacher = odd_teacher(tmp_path / "teacher")
    whole = resume_cut(lambda folder: same(folder, teacher), tmp_path)
    repeated = load_config(whole, {"output_dir": str(tmp_path / "again")})
    assert build(repeated, weights=False).plan == build(same(tmp_path / "run", teacher), weights=False).plan
    other = config(
        tmp_path / "run", make_teacher(tmp_path / "other"), student={"model": "same", "model_args": {}}
    )
    train(other)
    odd_teacher(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds other weights"):
        train(other)


def test_a_student_is_like_its_teacher_with_other_weights(tmp_path: Path) -> None:
    teacher, init = odd_teacher(tmp_path / "teacher"), f"local-dir:{odd_teacher(tmp_path / 'init')}"
    source = {"source": f"local-dir:{teacher}"}
    student = {"model": "same", "model_args": {}}
    for mode, start in (("finetune", None), ("finetune", init), ("scratch", "teacher")):
        run = config(tmp_path / "run", mode=mode, teacher=source, student={**student, "init": start})
        assert build(run, weights=False).plan.arguments["embed_dim"] == 32


def test_a_student_like_a_converted_teacher_has_its_operators(tmp_path: Path) -> None:
    words = ["convert", str(make_teacher(tmp_path / "plain")), "--plan", "0: linear"]
    assert main([*words, "--output_dir", str(tmp_path / "teacher")]) == 0
    run = same(tmp_path / "run", tmp_path / "teacher").model_copy(
        update={"transfer": TransferConfig(method="feature")}
    )
    assert list(converted_layers(build(run).task.trainable)) == [0]


def test_a_student_that_cannot_be_like_its_teacher_is_refused(finished: Any, tmp_path: Path) -> None:
    copying = finished("copy")[0] / "student"
    with pytest.raises(
        ConfigError, match=r"student.model=same: the teacher .* runs with the attention of its own"
    ):
        build(same(tmp_path / "run", copying), weights=False)
    cases = (("scratch", None, "mode=scratch has no teacher"), ("finetune", "x", "needs a teacher"))
    for mode, init, told in cases:
        run = RunConfig.model_validate({"mode": mode, "student": {"model": "same", "init": init}})
        with pytest.raises(ConfigError, match=f"^student.model=same .*{told}"):
            check_first(run)


@pytest.fixture(scope="module", autouse=True)
def every_run_has() -> None:
    """Evaluate each run on all digits, so that a student and its average have different accuracies."""


@pytest.fixture(scope="module")
def test_set() -> tuple[Tensor, Tensor]:
    """All test images as the students want them, which is as their teacher does, and their classes."""
    loader = create_eval_loader(config(Path("unused")).data, Preprocessing((1, 8, 8), (0.2,), (0.3,)))
    batches = [(images[valid], targets[valid]) for images, targets, valid in loader]
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def odd_teacher(folder: Path) -> Path:
    """Deeper, wider, with registers, for larger images of another mean, with a norm of another epsilon."""
    torch.manual_seed(5)
    arguments = {**ARGUMENTS, "depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 8}
    arguments |= {"num_classes": 3, "reg_tokens": 2, "qk_norm": True}
    model = timm.create_model(ARCHITECTURE, **arguments)
    for name, module in model.named_modules():
        if name.endswith("qkv"):
            module.weight.data.mul_(20)
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.3
    shown = Preprocessing.of(model, mean=(0.2,), std=(0.3,))
    how = {"model_args": arguments, "license": "cc-by-nc-4.0", "preprocessing": shown}
    write_student(model, folder, architecture=ARCHITECTURE, **how)
    return folder


def top1(logits: Tensor, targets: Tensor) -> float:
    return (logits.argmax(1) == targets).double().mean().item() * 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, float]]]:
    """Runs by method, with their teacher gone, and what each measured."""

    @cache
    def run(method: str) -> tuple[Path, dict[str, float]]:
        folder = tmp_path_factory.mktemp(method)
        teacher = odd_teacher(folder / "teacher")
        some = {"heads": "mean", "layers": [(2, 1)]} if method == "copy" else {"heads": "3>0,1>1"}
        result = train(
            config(
                folder / "run", teacher, teacher={"source": f"local-dir:{teacher}", "img_size": 16},
                transfer={"method": method, "share_drop_path": False, **some},
                optim={"max_steps": 6, "blr": 1.0, "ema": 0.5},
            )
        )  # fmt: skip
        shutil.rmtree(teacher)
        return folder / "run", result.metrics

    return run


def test_it_is_evaluated_without_its_teacher(
    finished: Any, test_set: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, metrics = finished("copy")
    words, (images, targets) = ["--device", "cpu", "--json", str(tmp_path / "scores.json")], test_set
    assert main(["evaluate", str(run), *words]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())[str(run)]
    assert scores["top1"] == pytest.approx(metrics["test_top1"], abs=1e-9)
    assert scores["loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    assert metrics["test_top1"] != metrics["test_ema_top1"]
    for source in (
        run / "student_ema",
        f"{run}#ema",
        f"{run}#best",
    ):  # scored once, and scored is the average
        with torch.no_grad():
            found = top1(graftvit.load(str(source))(images), targets)
        assert found == pytest.approx(metrics["test_ema_top1"], abs=1e-9)
    assert main(["visualize", str(run), "digits:1", "--output_dir", str(tmp_path / "seen")]) == 0
    numbers = json.loads((tmp_path / "seen" / "numbers.json").read_text())
    assert len(numbers["student"]["entropy"]) == ARGUMENTS["depth"]


def test_it_says_its_license_and_what_it_costs(finished: Any) -> None:
    run, _ = finished("copy")
    written = json.loads((run / "student" / "config.json").read_text())
    assert written["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    count = sum(p.numel() for p in load_pretrained(str(run)).model.teacher.parameters())
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
        load_pretrained(str(stopped))
    odd_teacher(run.parent / "teacher")
    try:
        for source, key in ((str(stopped), "test_top1"), (f"{stopped}#ema", "test_ema_top1")):
            model = graftvit.load(source)
            with torch.no_grad():
                assert top1(model(images), targets) == pytest.approx(metrics[key], abs=1e-9)
        save(str(stopped), tmp_path / "saved")
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
    assert load_pretrained(str(tmp_path / "a")).architecture == ARCHITECTURE
    assert graftvit.load(str(run), bare=True).state_dict().keys() == bare.state_dict().keys()
    with pytest.raises(CheckpointError, match="copies no teacher's attention"):
        graftvit.load(str(tmp_path / "a"), bare=True)


def test_what_it_cannot_be_is_refused_with_what_to_do(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished("copy_q")
    with pytest.raises(CheckpointError, match="--bare"):
        load_weights(timm.create_model(ARCHITECTURE, **ARGUMENTS), str(run))
    for sections, message in (
        ({"mode": "finetune", "student": {"init": str(run)}}, "--bare"),
        ({"mode": "finetune", "student": {"model": str(run), "model_args": {}}}, r"student\.model=.*--bare"),
        ({"source": run, "transfer": {"method": "distill"}}, "block_output, feature or logits"),
    ):
        with pytest.raises(GraftError, match=message):
            train(config(tmp_path / "refused", **sections))
    assert (
        main(["convert", str(run), "--plan", "*: linear", "--output_dir", str(tmp_path / "converted")]) == 2
    )
    assert "--bare" in capsys.readouterr().err
    save(str(run), tmp_path / "bare", bare=True)
    start = {"init": str(tmp_path / "bare")}
    train(config(tmp_path / "next", mode="finetune", student=start, optim={"max_steps": 1}))


def test_its_outputs_teach_and_it_takes_another_size_and_another_head(finished: Any, tmp_path: Path) -> None:
    run, _ = finished("copy")
    transfer = {"method": "logits", "share_drop_path": False}
    assert train(config(tmp_path, run, transfer=transfer, optim={"max_steps": 2})).steps == 2
    model = load_pretrained(str(run), img_size=16, num_classes=0).model
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 16)
    assert model.teacher.model.patch_embed.img_size == (32, 32)
    saved = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True, num_classes=3)
    assert saved(torch.rand(1, 1, 8, 8)).shape == (1, 3)


def averaged(folder: Path, teacher: Path, steps: int) -> list[dict[str, float]]:
    """Train with an average and an evaluation after each epoch, and return the records of evaluations."""
    optim = {"max_steps": steps, "warmup_epochs": 0, "lr": 0.02, "ema": 0.5}
    data = {"train_samples": 32, "batch_size": 16}
    train(config(folder, teacher, optim=optim, data=data, engine={"eval_every": 1}))
    return [record for record in read_records(folder / "log.jsonl") if "test_top1" in record]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, whose best evaluation is not its last."""
    folder = tmp_path_factory.mktemp("sources")
    averaged(folder / "run", make_teacher(folder / "teacher"), 12)
    return folder / "run"


def score_of(source: str) -> float:
    loaded = load_pretrained(source)
    loader = create_eval_loader(config(Path("unused")).data, loaded.preprocessing)
    return score_models({"model": loaded.model}, loader)["model"].top1


def test_each_word_is_the_model_that_the_log_scored(run: Path) -> None:
    logged = [record for record in read_records(run / "log.jsonl") if "test_top1" in record]
    best = max(record["test_ema_top1"] for record in logged)
    assert len({record["test_ema_top1"] for record in logged}) > 1
    assert (
        score_of(str(run)) == score_of(f"{run}#last") == score_of(f"{run}#student") == logged[-1]["test_top1"]
    )
    assert score_of(f"{run}#ema") == logged[-1]["test_ema_top1"]
    assert score_of(f"{run}#best") == score_of(f"local-dir:{run}#best") == best


def test_a_state_gives_what_was_exported(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    for word in ("", "#last", "#ema"):
        exported = load_pretrained(f"{moved}{word}")
        shutil.rmtree(moved / ("student_ema" if word == "#ema" else "student"), ignore_errors=True)
        state = load_pretrained(f"{moved}{word}")
        assert state.preprocessing == exported.preprocessing
        for key, tensor in exported.model.state_dict().items():
            assert torch.equal(tensor, state.model.state_dict()[key])


def test_a_run_that_went_on_is_its_newest_state(run: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(run, tmp_path / "longer")
    newest = averaged(longer, run.parent / "teacher", 16)[-1]
    for name in ("student", "student_ema"):  # as if it had been stopped before its end
        shutil.rmtree(longer / name)
        shutil.copytree(run / name, longer / name)
    assert score_of(str(longer)) == newest["test_top1"]
    assert score_of(f"{longer}#ema") == newest["test_ema_top1"]


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no best state.*leave #best out"):
        load_pretrained(f"{moved}#best")
    with pytest.raises(CheckpointError, match=r"#best is of the folder of a run"):
        load_pretrained(f"{moved / 'student'}#best")


@pytest.mark.parametrize("word", ["", "#best", "#ema"])
def test_every_command_takes_the_words(
    run: Path, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{run}{word}"
    assert main(["checkpoint", "info", source]) == 0
    assert main(["checkpoint", "save", source, str(tmp_path / "saved")]) == 0
    assert main(["push", source, "me/student", "--license", "mit", "--confirm_license", "--dry_run"]) == 0
    assert main(["evaluate", source, "--device", "cpu", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "Would push to me/student" in printed
    assert f" {score_of(str(tmp_path / 'saved')):.2f} [" in printed
