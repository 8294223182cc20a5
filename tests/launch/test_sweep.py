"""Sweeps: their words, cells, files and summary."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest
from graftvit.checkpoints.files import read_records
from graftvit.launch.load_config import dump_config, load_config, load_stages, parse_override
from graftvit.launch.summary import (
    Row,
    draw,
    numeric_key,
    read_cell,
    summarize,
    to_csv,
    to_markdown,
    write_summary,
)
from graftvit.launch.sweep import cell_configs, check_sweep, load_sweep, parse_sweep
from graftvit.models.errors import CheckpointError, ConfigError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from support.runs.engine_runs import config
from support.runs.typed import Typed
from support.slurm.sweep_folders import make_sweep, write_attempt, write_run

OUT = Path("runs/sweep")


def names(*words: str) -> list[str]:
    return [cell.name for cell in parse_sweep(words, OUT).cells]


def test_a_sweep_is_the_product_in_the_given_order() -> None:
    sweep = parse_sweep(["transfer.layers=first:6,[0,3,5]", "seed=0..1"], OUT)
    assert [cell.name for cell in sweep.cells] == [
        "layers=first-6,seed=0", "layers=first-6,seed=1", "layers=0-3-5,seed=0", "layers=0-3-5,seed=1",
    ]  # fmt: skip
    settings = sweep.cells[OUT / "cells" / "layers=0-3-5,seed=0"]
    assert settings == {"transfer.layers": "0,3,5", "seed": "0"}


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=3..3", ["3"]),
        ("seed=0..2,7", ["0", "1", "2", "7"]),
        ("label_seed=-1..1", ["-1", "0", "1"]),
        ("blr=1e-3, 1e-4", ["1e-3", "1e-4"]),
        ("transfer.layers=[0,3,5],all", ["0,3,5", "all"]),
        ("transfer.layers=[[2,0],[5,1]],all", ["[[2,0],[5,1]]", "all"]),
        ("student.plan=linear(feature=relu, scale=2),[0,3: softmax; *: linear]",
         ["linear(feature=relu, scale=2)", "0,3: softmax; *: linear"]),
        ("student.model_args={depth: 6, num_heads: 2},{depth: 12}",
         ["{depth: 6, num_heads: 2}", "{depth: 12}"]),
        ("student.model_args.img_size=[16,16],[32,32]", ["[16,16]", "[32,32]"]),
        ("trainable=[ab].*[cd],.*", ["[ab].*[cd]", ".*"]),
        ("trackers=[],[tensorboard,wandb]", ["[]", "tensorboard,wandb"]),
        ("data_path=../a,../b", ["../a", "../b"]),
    ],
)  # fmt: skip
def test_values(word: str, values: list[str]) -> None:
    cells = parse_sweep([word], OUT).cells.values()
    assert [value for cell in cells for value in cell.values()] == values


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed"], "'seed' has no values"),
        (["seed="], "seed='' has an empty value"),
        (["seed=0,,1"], "has an empty value"),
        (["layers=[0,3"], "a bracket without the other"),
        (["layers=0]"], "a bracket without the other"),
        (["seed=4..0"], "'4..0' has 0 values"),
        (["seed=0...4"], "'0...4' is no range"),
        (["blr=0.5..1"], "'0.5..1' is no range"),
        (["seed=0..99999999999999999"], "'0..99999999999999999' has 100,000,000,000,000,000 values"),
        (["seed=0..999,1000"], "1,001 cells"),
        (["seed=0..99", "label_seed=0..10"], "1,100 cells"),
        (["blr=1e-3,0.001"], "'0.001' is given twice"),
        (["blr=1", "optim.blr=2"], "--sweep optim.blr and --sweep optim.blr set the same thing"),
        (["student.model_args={depth: 6}", "student.model_args.depth=3"], "set the same thing"),
        (["output_dir=a,b"], "folder of its own"),
        (["sed=0..4"], "did you mean 'seed'?"),
        (["img_size.x=1"], "unknown key"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(words, OUT)
    assert sentence in str(caught.value)
    assert "--sweep" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_would_be_one_file_are_kept_apart() -> None:
    found = names("model=vit:a,vit-a,VIT-A,///," + "x" * 300)
    assert len({name.casefold() for name in found}) == 5
    assert all(len(name) < 60 for name in found)
    assert names("student.drop_path=0,0.1", "teacher.model=a", "student.model=a") == [
        "drop_path=0,teacher.model=a,student.model=a", "drop_path=0.1,teacher.model=a,student.model=a",
    ]  # fmt: skip
    found = names(*(f"student.model_args.{'k' * 60}{i}={'v' * 30},w" for i in range(4)))
    assert len(set(found)) == 16
    assert max(map(len, found)) == 180  # fits a file system


KEYS = ["transfer.layers", "optim.blr", "seed", "student.plan", "teacher.model_args.a/b", "data.aa"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters=",()[]{}"), min_size=1).filter(
    lambda text: text.strip() == text and not re.fullmatch(r"[-+0-9.]*[0-9][-+0-9.]*", text)
)


@given(
    st.dictionaries(st.sampled_from(KEYS), st.lists(TEXTS, min_size=1, max_size=4), max_size=3, min_size=1)
)
def test_any_values_make_a_product_of_safe_names(axes: dict[str, list[str]]) -> None:
    words = [f"{key}={','.join(f'[{value}]' for value in values)}" for key, values in axes.items()]
    try:
        sweep = parse_sweep(words, OUT)
    except ConfigError as error:
        assert "twice" in str(error)  # noqa: PT017
        return
    assert len(sweep.cells) == math.prod(map(len, axes.values()))
    assert len({cell.name.casefold() for cell in sweep.cells}) == len(sweep.cells)
    assert len({tuple(settings.values()) for settings in sweep.cells.values()}) == len(sweep.cells)
    for cell in sweep.cells:
        assert re.fullmatch(r"[A-Za-z0-9_.+=,~-]+", cell.name)
        assert len(cell.name.encode()) <= 200
    assert parse_sweep(words, OUT) == sweep


def test_a_sweep_is_read_back_also_where_it_was_moved(tmp_path: Path) -> None:
    sweep = parse_sweep(["transfer.layers=first:6,all", "seed=0..2"], tmp_path / "old")
    assert load_sweep(tmp_path / "old") is None
    sweep.save()
    assert load_sweep(tmp_path / "old") == sweep
    (tmp_path / "old").rename(tmp_path / "new")
    moved = load_sweep(tmp_path / "new")
    assert moved is not None
    assert next(iter(moved.cells)) == tmp_path / "new" / "cells" / "layers=first-6,seed=0"


VICTIM = '{"cells": [{"name": "../../victim", "settings": {}}]}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"cells": []}', '{"cells": [{}]}', '{"cells": 3}', "\x00", VICTIM], ids=repr
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    """And one of somebody else has no cell elsewhere."""
    (tmp_path / "sweep.json").write_text(text)
    why = r"'\.\./\.\./victim' is no name of a file" if text == VICTIM else "cannot be read"
    with pytest.raises(CheckpointError, match=rf"sweep\.json:? {why}"):
        load_sweep(tmp_path)


def test_a_folder_takes_one_sweep(tmp_path: Path) -> None:
    sweep = parse_sweep(["transfer.layers=[0,3],all", "seed=0..1"], tmp_path)
    check_sweep(sweep)
    sweep.save()
    check_sweep(parse_sweep(["layers=[0,3],all", "seed=0,1"], tmp_path))
    with pytest.raises(ConfigError, match=f"holds another sweep: .*jobs resume {tmp_path}"):
        check_sweep(parse_sweep(["seed=0..1"], tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run that is no sweep"):
        check_sweep(parse_sweep(["seed=0..1"], tmp_path / "run"))


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_each_cell_has_its_whole_configuration(tmp_path: Path) -> None:
    stages = "[{name: align, mode: align}, {name: task, mode: finetune, optim: {min_lr: 0.1}}]"
    path = write_recipe(tmp_path, f"seed: 3\noptim: {{epochs: 7}}\nstages: {stages}\n")
    sweep = parse_sweep(["transfer.layers=first:6,[0,3]", "seed=0..1"], tmp_path / "out")
    configs = cell_configs(sweep, path, [parse_override("optim.blr=0.5")])
    cell = list(sweep.cells)[-1]
    align, task = load_stages(write_recipe(tmp_path, configs[cell]))
    assert [(one.name, one.config.mode) for one in (align, task)] == [
        ("align", "align"),
        ("task", "finetune"),
    ]
    for one in (align.config, task.config):
        assert (one.transfer.layers, one.seed, one.optim.epochs, one.optim.blr) == ("0,3", 1, 7, 0.5)
        assert one.output_dir == cell
    assert task.config.optim.min_lr == 0.1 != align.config.optim.min_lr


def test_a_setting_of_one_loss_is_swept(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "transfer: {losses: [{method: distill}, {method: feature}]}\n")
    sweep = parse_sweep(["losses[1].weight=1,0.5", "transfer.losses[0].layers=all,[0,3]"], tmp_path / "out")
    configs = cell_configs(sweep, path)
    (*_, cell) = configs
    assert cell.name == "weight=0.5,layers=0-3"
    first, second = load_config(write_recipe(tmp_path, configs[cell])).transfer.losses
    assert (first.layers, second.weight) == ([0, 3], 0.5)
    with pytest.raises(ConfigError, match="set the same thing"):
        parse_sweep(["losses[1].weight=1,2", "losses=[],[{method: copy}]"], tmp_path)
    with pytest.raises(ConfigError, match=r"there is no entry 2 in losses, which has 2"):
        cell_configs(parse_sweep(["losses[2].weight=1,2"], tmp_path), path)


def test_every_cell_is_checked(tmp_path: Path) -> None:
    sweep = parse_sweep(["seed=0..1", "blr=1e-3,fast"], tmp_path)
    with pytest.raises(ConfigError, match=r"--sweep optim\.blr is 'fast', but must be a number"):
        cell_configs(sweep, None)
    sweep = parse_sweep(["seed=0..1", "model_args={depth: 3},{depth: 4}"], tmp_path)
    for swept in ("seed=3", "student.model_args.depth=2"):
        with pytest.raises(ConfigError, match="leave one of the two out"):
            cell_configs(sweep, None, [parse_override(swept)])


def table(summary: list[Row]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(summary))))


def test_the_tables_in_full(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "transfer.layers=first:6,all", "seed=0..1")
    write_run(cells[0], [4.0, 3.0], ema=[1.0, 5.0], loss=0.25)
    write_run(cells[1], [4.0, 5.0], ema=[1.0, 6.0], loss=0.75)
    write_run(cells[2], [4.0, 4.5], ema=[2.0, 1.0], loss=2.0)
    write_attempt(cells[3], "failed", "boom\n  twice")
    summary = summarize(tmp_path)
    assert to_markdown(summary) == (
        "| transfer.layers | done | test top1 | best test top1 | test ema top1 | best test ema top1 | train loss |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| first:6 | 2/2 | 4.00 ± 1.41 | 4.50 ± 0.71 | 5.50 ± 0.71 | 5.50 ± 0.71 | 0.5000 ± 0.3536 |\n"
        "| all | 1/2 | 4.50 | 4.50 | 1.00 | 2.00 | 2.0000 |\n"
        "\n1 cell not done:\n\n- layers=all,seed=1 failed: boom twice\n"
    )
    one, two = table(summary)
    assert float(one["test_ema_top1_std"]) == pytest.approx(0.5**0.5)
    assert (one["done"], one["asked"], one["not_done"]) == ("2", "2", "")
    assert (two["test_top1_mean"], two["test_top1_std"]) == ("4.5", "")
    assert two["not_done"] == "layers=all,seed=1 failed: boom twice"


def test_accuracies_have_the_interval_of_their_number_of_images(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..1")
    for cell in cells:
        write_run(cell, [50.0, 75.0])
        log = cell / "log.jsonl"
        log.write_text(log.read_text().replace('"test_top1"', '"test_samples": 128, "test_top1"'))
    summary = summarize(tmp_path)
    (row,) = table(summary)
    found = binomtest(96, 128).proportion_ci(method="wilson")
    assert row["test_images"] == "128"
    assert float(row["test_top1_low"]) == pytest.approx(100 * found.low)
    assert float(row["test_top1_high"]) == pytest.approx(100 * found.high)
    text = to_markdown(summary)
    assert f"75.00 ± 0.00 [{100 * found.low:.1f}, {100 * found.high:.1f}]" in text
    assert "95 % interval (Wilson's) of an accuracy on 128 test images" in text


def test_a_cell_is_done_only_when_its_run_is(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..9")
    write_run(cells[0], [1.0, 2.0])
    write_run(cells[1], [1.0, 2.0], student=False)
    write_run(cells[2], [1.0, 2.0], epochs=3)  # longer than when its student was written
    write_run(cells[3], [1.0, 2.0], epochs=100, max_steps=20)
    write_run(cells[4], [1.0, 2.0], max_steps=21)
    write_run(cells[5], [], student=False)
    write_attempt(cells[6], None)
    write_run(cells[7], [1.0, 2.0])
    write_attempt(cells[7], "failed", "an attempt that came too late")
    write_attempt(cells[8], "failed", "x")
    write_attempt(cells[8], "requeued")
    done = {"test_top1": 2.0, "best_test_top1": 2.0, "train_loss": 1.0}
    assert [read_cell(cell) for cell in cells] == [
        done, "unfinished: step 20 of 20", "unfinished: step 20 of 30", done, "unfinished: step 20 of 21",
        "unfinished: step 0", "unfinished: step 0", done, "unfinished: step 0", "not begun",
    ]  # fmt: skip
    (row,) = summarize(tmp_path)
    assert (len(row.results), row.asked) == (3, 10)


def test_an_unfinished_cell_gives_no_number_and_evaluation_may_skip_epochs(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..1")
    write_run(cells[0], [None, 7.0, None, 6.0], epochs=4)
    write_run(cells[1], [50.0, 60.0], student=False)
    assert read_cell(cells[0]) == {"test_top1": 6.0, "best_test_top1": 7.0, "train_loss": 1.0}
    summary = summarize(tmp_path)
    assert "| as in the recipe | 1/2 | 6.00 | 7.00 |" in to_markdown(summary)
    assert "- seed=1 unfinished: step 20 of 20" in to_markdown(summary)


def test_runs_without_accuracy_are_compared_by_loss(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "mask_ratio=0.5,0.75")
    for cell, loss in zip(cells, (0.4, 0.3), strict=True):
        write_run(cell, [None, None], loss=loss)
    summary = summarize(tmp_path)
    assert to_markdown(summary).splitlines()[2] == "| 0.5 | 1/1 | 0.4000 |"
    (axes,) = draw(summary).axes
    assert axes.get_ylabel().startswith("training loss")


def test_of_stages_the_last_one_counts(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..2")
    for cell in cells:
        write_run(cell, [None, None], stage="1-align", student=False)
    for cell in cells[:2]:
        write_run(cell, [30.0, 40.0], stage="2-task", student=cell is cells[0])
    done, copying, first = map(read_cell, cells)
    assert done == {"test_top1": 40.0, "best_test_top1": 40.0, "train_loss": 1.0}
    assert (copying, first) == (
        "unfinished: stage 2-task, step 20 of 20",
        "unfinished: stage 1-align, step 20 of 20",
    )
    write_run(cells[0], [1.0, 10.0], stage="10-x")
    assert "| 10.00 |" in to_markdown(summarize(tmp_path))


def test_a_damaged_cell_does_not_stop_the_summary(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "seed=0..1")
    for cell in cells:
        write_run(cell, [1.0, 2.0])
    (cells[0] / "log.jsonl").write_bytes(b"\xff\x00: [")
    assert summarize(tmp_path)[0].left == ["seed=0 unfinished: step 0"]
    log = cells[1] / "log.jsonl"
    log.write_text('7\n{"epoch": 0, "st\n' + log.read_text())  # a cut line hides no later record
    assert "| 1/2 | 2.00 |" in to_markdown(summarize(tmp_path))


def test_no_cell_done_makes_tables_and_no_plot(tmp_path: Path) -> None:
    make_sweep(tmp_path, "trainable=a|b,c")
    assert [path.name for path in write_summary(tmp_path, summarize(tmp_path))] == [
        "summary.csv",
        "summary.md",
    ]
    text = (tmp_path / "summary.md").read_text()
    assert "- trainable=c not begun\n" in text
    assert "| a\\|b | 0/1 |" in text, "bars in values do not break the table"


def test_the_files_are_written_beside_the_sweep(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "student.plan=[*: linear; 0,1: softmax]")
    write_run(cell, [1.0, 2.0])
    summary = summarize(tmp_path)
    assert write_summary(tmp_path, summary) == [
        tmp_path / f"summary.{suffix}" for suffix in ("csv", "md", "png")
    ]
    assert table(summary)[0]["student.plan"] == "*: linear; 0,1: softmax"
    assert (tmp_path / "summary.csv").read_text() == to_csv(summary)
    with Image.open(tmp_path / "summary.png") as image:
        assert image.size[0] == 1200
    assert list(tmp_path.glob(".*")) == []


def test_over_a_number_the_plot_has_lines(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path, "blr=1e-2,1e-4,1e-3", "transfer.layers=all,$first$", "seed=0..1")
    for place, cell in enumerate(cells):
        write_run(cell, [0.0, float(place)])
    summary = summarize(tmp_path)
    assert numeric_key(summary) == "optim.blr"
    (axes,) = draw(summary).axes
    assert axes.get_xscale() == "log"
    lines = [container.lines[0] for container in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[1e-4, 1e-3, 1e-2]] * 2
    assert list(lines[0].get_ydata()) == [4.5, 8.5, 0.5]  # cells 4 and 5, 8 and 9, 0 and 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["layers=all", r"layers=\$first\$"]
    write_summary(tmp_path, summary)


@pytest.mark.parametrize(
    "words",
    [
        ["blr=1,2", "temperature=1,2"],
        ["layers=all,first:2"],
        ["blr=1,2", f"label_seed={','.join('a' * n for n in range(1, 9))}"],
    ],
)
def test_otherwise_a_point_a_setting(tmp_path: Path, words: list[str]) -> None:
    cells = make_sweep(tmp_path, *words)
    for cell in cells:
        write_run(cell, [1.0, 2.0], ema=[3.0, 4.0])
    (axes,) = draw(summarize(tmp_path)).axes
    assert len(axes.get_yticklabels()) == len(cells)
    assert len(axes.containers) == len(cells)
    assert axes.get_xlabel().startswith("top-1 of the average")
    assert list(axes.containers[0].lines[0].get_xdata()) == [4.0]


def test_what_is_no_sweep_is_refused(tmp_path: Path, typed: Typed) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is not a sweep"):
            summarize(folder)


def test_it_prints_the_table_and_writes_the_files(tmp_path: Path, typed: Typed) -> None:
    cells = make_sweep(tmp_path, "transfer.layers=first:6,all", "seed=0..1")
    for cell in cells[:3]:
        write_run(cell, [1.0, 2.0])
    shown = typed("jobs", "summary", tmp_path)
    assert shown.out == (tmp_path / "summary.md").read_text()
    assert "| first:6 | 2/2 | 2.00 ± 0.00 |" in shown.out
    assert "- layers=all,seed=1 not begun" in shown.out
    assert shown.err.splitlines() == [str(tmp_path / f"summary.{end}") for end in ("csv", "md", "png")]
    (tmp_path / "summary.csv").unlink()
    (tmp_path / "summary.csv").mkdir()  # root may write to any folder, but not a file over one
    shown = typed("jobs", "summary", tmp_path, code=1)
    assert "- layers=all,seed=1 not begun" in shown.out
    assert "summary.csv cannot be written" in shown.err
    assert "FOLDER" in typed("jobs", "summary", code=2).err


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("stages", [False, True])
def test_cells_that_the_ordinary_command_ran(tmp_path: Path, stages: bool, typed: Typed) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = dump_config(config(tmp_path / "elsewhere", optim={"epochs": 1}))
    recipe.write_text(text + "stages: [{name: one}, {name: two}]\n" * stages)
    make_sweep(tmp_path / "out", "seed=0..1", "clip_grad=1,none")
    sweep = load_sweep(tmp_path / "out")
    assert sweep is not None
    for cell, content in list(cell_configs(sweep, recipe).items())[:3]:
        (tmp_path / f"{cell.name}.yaml").write_text(content)
        typed("train", tmp_path / f"{cell.name}.yaml")
    rows = summarize(tmp_path / "out")
    assert [(row.settings["optim.clip_grad"], len(row.results)) for row in rows] == [("1", 2), ("none", 1)]
    for numbers, seed in zip(rows[0].results, range(2), strict=True):
        run = tmp_path / "out" / "cells" / f"seed={seed},clip_grad=1" / ("2-two" if stages else "")
        last = read_records(run / "log.jsonl")[-1]
        assert {name: last[name] for name in ("test_ema_top1", "train_loss")}.items() <= numbers.items()
    assert not (tmp_path / "elsewhere").exists()
