from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from graftvit.launch.load_config import Setting, load_comparison
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.analysis.compare import compare as compare_run
from graftvit.transfer.analysis.compare.compare import run_compare
from graftvit.transfer.analysis.compare.comparison_cells import SET_BY_CELLS, Comparison, only_named
from graftvit.transfer.analysis.compare.comparison_report import write_report
from graftvit.transfer.analysis.compare.student_cell import cell_stages, fresh_model, is_linear, load_maps
from graftvit.transfer.cells import StoppedError
from graftvit.transfer.config import RunConfig
from safetensors.torch import load_file, save_file
from support.runs.compare_runs import cell, write_config

PLANS = {"linear": "*: linear", "focused": "0: focused", "softmax": "*: softmax", "found": "*: attnzero_105"}


def all_of(comparison: Comparison, **options: Any) -> list[str]:
    return run_compare(comparison, comparison.cells(), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that ran to its end."""
    folder = tmp_path_factory.mktemp("done")
    comparison = load_comparison(write_config(folder, PLANS, speed_img_size=[16]))
    assert all_of(comparison) == []
    write_report(comparison)
    return folder


def test_the_table_has_the_numbers_of_the_logs(done: Path) -> None:
    shown = {row["name"]: row for row in json.loads((done / "out" / "compare.json").read_text())}
    for name in ("uniform", "linear", "focused"):
        stages = {score["stage"]: score for score in shown[name]["scores"]}
        assert list(stages) == ["zero-shot", "align", "task"]
        for place, stage in enumerate(("align", "task"), 1):
            log = done / "out" / "cells" / f"{name}-8" / f"{place}-{stage}" / "log.jsonl"
            records = [json.loads(line) for line in log.read_text().splitlines()]
            last = [record for record in records if "test_top1" in record][-1]
            assert stages[stage]["top1"] == last["test_top1"]
            assert stages[stage]["top5"] == last["test_top5"]
            assert stages[stage]["steps"] == 8
            epochs = [record["seconds"] for record in records if "n_parameters" in record]
            assert len(epochs) == 2
            assert stages[stage]["seconds"] == pytest.approx(sum(epochs))
        first = json.loads((done / "out" / "cells" / f"{name}-8" / "1-align" / "log.jsonl").open().readline())
        assert first["step"] == 0
        assert stages["zero-shot"]["top1"] == first["test_top1"]


def test_softmax_needs_no_alignment_and_starts_as_the_teacher(done: Path) -> None:
    softmax, teacher = cell(done, "softmax-8"), cell(done, "teacher-8")
    assert [score["stage"] for score in softmax["scores"]] == ["zero-shot", "task"]
    assert softmax["scores"][0]["top1"] == teacher["scores"][0]["top1"]
    assert softmax["parameters"] == teacher["parameters"]


def test_costs_are_those_of_the_operators(done: Path) -> None:
    uniform, linear, focused = (cell(done, f"{name}-8") for name in ("uniform", "linear", "focused"))
    assert uniform["new_parameters"] == 0
    assert focused["new_parameters"] > 0
    assert (uniform["linear"], linear["linear"], focused["linear"]) == (True, True, False)
    for record in (uniform, linear, focused):
        assert [speed["size"] for speed in record["speeds"]] == [8, 16]
        for speed in record["speeds"]:
            assert speed["tokens"] == speed["size"] ** 2 // 16 + 1
            assert 0 < speed["latency_low"] <= speed["latency"] <= speed["latency_high"]
            assert speed["peak_bytes"] > 0
            # sums and products by element, which the counter does not see, are much of so small a model
            assert speed["counted_macs"] <= speed["macs"] < 1.3 * speed["counted_macs"]
    assert all(speed["macs"] == speed["counted_macs"] for speed in cell(done, "softmax-8")["speeds"])
    assert set(linear["layer_errors"]) == {"zero-shot", "align", "task"}
    assert set(linear["layer_errors"]["align"]) == {"0", "1"}
    assert set(focused["layer_errors"]["align"]) == {"0"}


def test_alignment_brings_the_layers_nearer(done: Path) -> None:
    errors = cell(done, "linear-8")["layer_errors"]
    assert sum(errors["align"].values()) < sum(errors["zero-shot"].values())


def test_the_report_is_there_with_pictures(done: Path) -> None:
    out = done / "out"
    names = {path.name for path in (out / "images").iterdir()}
    drawn = {"accuracy_latency", "accuracy_memory", "latency_tokens", "layer_errors", "attention"}
    assert names == {f"{name}.png" for name in drawn}
    for path in (out / "images").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    markdown = (out / "compare.md").read_text()
    assert all(f"| {name} |" in markdown for name in ("teacher", "uniform", *PLANS))
    page = (out / "compare.html").read_text()
    assert "<table>" in page
    assert "Attention maps of 6 models, a row each, in layers 0, 1." in page


def test_each_cell_keeps_where_it_looks(done: Path) -> None:
    kept = {
        name: load_maps(done / "out" / "cells" / f"{name}-8") for name in ("teacher", "softmax", "uniform")
    }
    images = [each.pictures for each in kept.values() if each is not None]
    assert len(images) == 3
    for one, other in zip(images[0], images[1], strict=True):
        np.testing.assert_array_equal(one, other)
    uniform = kept["uniform"]
    assert uniform is not None
    assert uniform.query == "the class token"
    for each in uniform.maps.values():
        np.testing.assert_allclose(each.heat, np.full(each.grid, 1 / (1 + each.heat.size)), rtol=1e-5)


def test_what_is_done_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load_comparison(done / "compare.yaml")
    with pytest.raises(ConfigError, match="measured with other settings"):
        all_of(replace(comparison, compare=comparison.compare.model_copy(update={"repeats": 3})))
    monkeypatch.setattr(compare_run, "_run_cell", None)
    said: list[str] = []
    assert all_of(comparison, tell=said.append) == []
    settings = [Setting("data.workers", 3, "--workers"), Setting("engine.progress", False, "--no-progress")]
    assert all_of(load_comparison(done / "compare.yaml", settings), tell=said.append) == []
    assert said == ["6 of 6 cells are done"] * 2


QUIET = {
    "data.workers": 3, "data.stage": "/scratch", "data.data_path": "moved", "data.download": True,
    "data.max_bad_images": 7, "transfer.cache": "kept", "transfer.cache_limit": 3.0,
    "engine.progress": False, "engine.log_interval": 7, "engine.save_every": 9, "engine.save_minutes": 9.0,
    "engine.keep_states": 2, "engine.stop_grace": 60.0, "engine.resume": "never", "engine.trackers": ("tensorboard",),
    "engine.evaluate_start": True, "engine.evaluate_teacher": False,
}  # fmt: skip
"""Settings that change no number of a cell."""
LOUD = {
    "data.batch_size": 16,
    "optim.lr": 0.5,
    "engine.precision": "bf16",
    "engine.device": "auto",
    "seed": 3,
}


def changed(config: RunConfig, key: str, value: object) -> RunConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={name: value})
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


@pytest.mark.parametrize("key", [*QUIET, *LOUD])
def test_a_setting_decides_the_digest_of_a_cell_if_its_numbers_depend_on_it(key: str, tmp_path: Path) -> None:
    plain = load_comparison(write_config(tmp_path, {"linear": "*: linear"}))
    plain = replace(plain, teacher=plain.config)
    assert plain.teacher is not None
    value = {**QUIET, **LOUD}[key]
    stages = [replace(stage, config=changed(stage.config, key, value)) for stage in plain.stages]
    others = [replace(plain, stages=stages)]
    if key not in SET_BY_CELLS:
        others.append(replace(plain, teacher=changed(plain.teacher, key, value)))
    for other in others:
        same = [plain.digest(each) == other.digest(each) for each in plain.cells()]
        assert set(same) == {key in QUIET}


def other_numbers(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)


def other_activation(teacher: Path) -> None:
    described = json.loads((teacher / "config.json").read_text())
    described["model_args"]["act_layer"] = "relu"
    (teacher / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("change", [other_numbers, other_activation])
def test_cells_of_another_teacher_behind_the_same_path_do_not_go_into_one_table(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    run_compare(load_comparison(path), only_named(load_comparison(path).cells(), ["teacher"]))
    (record,) = (tmp_path / "out" / "cells").glob("teacher*/cell.json")
    assert len(json.loads(record.read_text())["teacher"]) == 16
    change(tmp_path / "given-teacher")
    comparison = load_comparison(path)
    with pytest.raises(ConfigError, match=r"cells.teacher\S* was measured with another teacher"):
        run_compare(comparison, only_named(comparison.cells(), ["linear"]))
    assert not list((tmp_path / "out" / "cells").glob("linear*"))
    with pytest.raises(
        ConfigError, match=r"was measured with (another teacher|other settings)"
    ):  # none is left
        run_compare(comparison, only_named(comparison.cells(), ["teacher"]))


@pytest.mark.parametrize("place", ["cells/linear-8", "cells", "cells/linear-8/1-align", "teacher"])
def test_a_link_leads_no_cell_out_of_the_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    comparison = load_comparison(write_config(tmp_path, {"linear": "*: linear"}))
    made = comparison.config.model_copy(update={"output_dir": comparison.folder / "teacher"})
    comparison = replace(comparison, teacher=made)
    link = comparison.folder / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "victim")
    monkeypatch.setattr(compare_run, "train", None)
    with pytest.raises(ConfigError, match=r"leads out of \S*out by a link: remove the link"):
        all_of(comparison)
    assert not list((tmp_path / "victim").iterdir())


def test_ctrl_c_stops_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load_comparison(write_config(tmp_path, {"linear": "*: linear"}))

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_run, "train_cell", interrupted)
    with pytest.raises(StoppedError, match="SIGINT in uniform-8") as stopped:
        all_of(comparison)
    assert stopped.value.exit_code == 130
    assert cell(tmp_path, "teacher-8")["error"] is None
    assert not (tmp_path / "out" / "cells" / "uniform-8" / "cell.json").exists()


def test_linear_means_every_layer(tmp_path: Path) -> None:
    config = load_comparison(write_config(tmp_path, PLANS)).config
    plans = {
        "*: linear": True,
        "0: linear": False,
        "*: monarch": False,
        "*: uniform": True,
        "*: softmax": False,
    }
    assert {plan: is_linear(fresh_model(config, plan, 8)) for plan in plans} == plans


def test_a_plan_that_is_none_is_said_before_anything_runs(tmp_path: Path) -> None:
    comparison = load_comparison(write_config(tmp_path, {"odd": "*: lineal"}))
    with pytest.raises(GraftError, match=r"compare\.plans: odd at 8 px.*lineal"):
        compare_run.check_cells(comparison, comparison.cells())


@pytest.mark.parametrize("made", [False, True])
def test_a_plan_that_a_stage_cannot_train_is_said_before_anything_runs(made: bool, tmp_path: Path) -> None:
    path = write_config(tmp_path, {"linear": "*: linear", "softmax": "*: softmax"})
    config = yaml.safe_load(path.read_text())
    config["stages"][1]["transfer"] = {"method": "distill"}
    if made:
        config["teacher"]["source"] = "local-dir:runs/nothing"
        config["compare"]["teacher_recipe"] = str(tmp_path / "teacher.yaml")
        recipe = {"mode": "scratch", "student": {**config["student"], "init": None}, "data": config["data"]}
        (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe))
    path.write_text(yaml.safe_dump(config))
    comparison = load_comparison(path)
    with pytest.raises(ConfigError, match=r"compare\.plans: linear at 8 px: stage task: layer 0"):
        compare_run.check_cells(comparison, only_named(comparison.cells(), ["linear", "softmax"]))
    compare_run.check_cells(comparison, only_named(comparison.cells(), ["teacher", "softmax"]))


@pytest.mark.parametrize("match", ["output", "map", "probes", "rows"])
def test_plans_go_through_the_stages_that_they_learn_in(match: str, tmp_path: Path) -> None:
    path = write_config(
        tmp_path, {"linear": "*: linear", "mixed": "0: uniform; 1: linear", "softmax": "*: softmax"}
    )
    config = yaml.safe_load(path.read_text())
    config["stages"][0]["align"] = {"match": match}
    path.write_text(yaml.safe_dump(config))
    comparison = load_comparison(path)
    cells = {found.name: found for found in comparison.cells() if found.plan is not None}
    stages = {
        name: [stage.name for stage in cell_stages(comparison.stages, found, tmp_path)]
        for name, found in cells.items()
    }
    both = ["align", "task"]
    floor = both if match == "output" else ["task"]
    assert stages == {"uniform": floor, "linear": both, "mixed": both, "softmax": ["task"]}
    with pytest.raises(ConfigError, match=r"no layer of '\*: softmax' learns in align: add a stage"):
        cell_stages(comparison.stages[:1], cells["softmax"], tmp_path)


def test_the_floor_is_trained_where_its_map_cannot_learn(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"linear": "*: linear"})
    config = yaml.safe_load(path.read_text())
    config["stages"][0]["align"] = {"match": "map"}
    path.write_text(yaml.safe_dump(config))
    comparison = load_comparison(path)
    assert run_compare(comparison, comparison.cells()[1:2]) == []
    assert [score["stage"] for score in cell(tmp_path, "uniform-8")["scores"]] == ["zero-shot", "task"]
