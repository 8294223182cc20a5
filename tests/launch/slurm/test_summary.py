from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from graftvit.launch.slurm.summary import (
    Summary,
    draw,
    numeric_key,
    read_cell,
    summarize,
    to_csv,
    to_markdown,
    write_summary,
)
from graftvit.models.errors import CheckpointError, ConfigError
from PIL import Image
from scipy.stats import binomtest
from support.slurm.sweep_folders import make_sweep, write_attempt, write_run


def table(summary: Summary) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(summary))))


def test_means_and_deviations_are_those_of_the_sample(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "transfer.layers=first:6,all", "seed=0..2")
    for cell, top1, loss in zip(
        sweep.cells, (1.0, 2.0, 6.0, 10.0, 10.0, 10.0), (0.5, 0.5, 1.1) * 2, strict=True
    ):
        write_run(cell, [8.0, top1], loss=loss)
    first, second = summarize(tmp_path).rows
    assert first.settings == {"transfer.layers": "first:6"}
    assert (first.done, first.asked) == (3, 3)
    assert set(first.measures) == {"test_top1", "best_test_top1", "train_loss"}
    last = first.measures["test_top1"]
    assert last.mean == pytest.approx(3.0)
    assert last.std == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert first.measures["best_test_top1"].values == (8.0, 8.0, 8.0)
    assert first.measures["train_loss"].mean == pytest.approx(0.7)
    assert first.measures["train_loss"].std == pytest.approx(0.12**0.5)
    assert second.measures["test_top1"].std == 0.0
    assert summarize(tmp_path).missing == []


def test_the_tables_in_full(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "transfer.layers=first:6,all", "seed=0..1")
    write_run(sweep.cells[0], [4.0, 3.0], ema=[1.0, 5.0], loss=0.25)
    write_run(sweep.cells[1], [4.0, 5.0], ema=[1.0, 6.0], loss=0.75)
    write_run(sweep.cells[2], [4.0, 4.5], ema=[2.0, 1.0], loss=2.0)
    write_attempt(sweep.cells[3], "failed", "boom\n  twice")
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
    sweep = make_sweep(tmp_path, "seed=0..1")
    for cell in sweep.cells:
        write_run(cell, [50.0, 75.0])
        log = cell.folder / "log.jsonl"
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
    sweep = make_sweep(tmp_path, "seed=0..9")
    write_run(sweep.cells[0], [1.0, 2.0])
    write_run(sweep.cells[1], [1.0, 2.0], student=False)
    write_run(sweep.cells[2], [1.0, 2.0], epochs=3)  # longer than when its student was written
    write_run(sweep.cells[3], [1.0, 2.0], epochs=100, max_steps=20)
    write_run(sweep.cells[4], [1.0, 2.0], max_steps=21)
    write_run(sweep.cells[5], [], student=False)
    write_attempt(sweep.cells[6], None)
    write_run(sweep.cells[7], [1.0, 2.0])
    write_attempt(sweep.cells[7], "failed", "an attempt that came too late")
    write_attempt(sweep.cells[8], "failed", "x")
    write_attempt(sweep.cells[8], "requeued")
    found = [(result.state, result.why) for result in map(read_cell, sweep.cells)]
    assert found == [
        ("done", ""), ("unfinished", "epoch 2 of 2"), ("unfinished", "epoch 2 of 3"), ("done", ""),
        ("unfinished", "step 20 of 21"), ("unfinished", "epoch 0 of 2"), ("unfinished", ""), ("done", ""),
        ("unfinished", ""), ("not begun", ""),
    ]  # fmt: skip
    (row,) = summarize(tmp_path).rows
    assert (row.done, row.asked) == (3, 10)


def test_an_unfinished_cell_gives_no_number(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "seed=0..1")
    write_run(sweep.cells[0], [1.0, 2.0])
    write_run(sweep.cells[1], [50.0, 60.0], student=False)
    summary = summarize(tmp_path)
    assert summary.rows[0].measures["test_top1"].values == (2.0,)
    assert "| as in the recipe | 1/2 | 2.00 |" in to_markdown(summary)
    assert "- seed=1 unfinished: epoch 2 of 2" in to_markdown(summary)


def test_evaluation_may_skip_epochs(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    write_run(cell, [None, 7.0, None, 6.0], epochs=4)
    assert read_cell(cell).numbers == {"test_top1": 6.0, "best_test_top1": 7.0, "train_loss": 1.0}


def test_runs_without_accuracy_are_compared_by_loss(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "mask_ratio=0.5,0.75")
    for cell, loss in zip(sweep.cells, (0.4, 0.3), strict=True):
        write_run(cell, [None, None], loss=loss)
    summary = summarize(tmp_path)
    assert summary.names == ["train_loss"]
    assert to_markdown(summary).splitlines()[2] == "| 0.5 | 1/1 | 0.4000 |"
    (axes,) = draw(summary).axes
    assert axes.get_ylabel().startswith("training loss")


def test_of_stages_the_last_one_counts(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "seed=0..2")
    for cell in sweep.cells:
        write_run(cell, [None, None], stage="1-align", student=False)
    for cell in sweep.cells[:2]:
        write_run(cell, [30.0, 40.0], stage="2-task", student=cell is sweep.cells[0])
    done, copying, first = (read_cell(cell) for cell in sweep.cells)
    assert (done.state, done.numbers["test_top1"]) == ("done", 40.0)
    assert (copying.state, copying.why) == ("unfinished", "stage 2-task, epoch 2 of 2")
    assert (first.state, first.why) == ("unfinished", "stage 1-align, epoch 2 of 2")


def test_the_tenth_stage_comes_after_the_second(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    for number in (2, 10):
        write_run(cell, [1.0, float(number)], stage=f"{number}-x")
    assert read_cell(cell).numbers["test_top1"] == 10.0


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl"])
def test_a_damaged_cell_does_not_stop_the_summary(tmp_path: Path, name: str) -> None:
    sweep = make_sweep(tmp_path, "seed=0..1")
    for cell in sweep.cells:
        write_run(cell, [1.0, 2.0])
    (sweep.cells[0].folder / name).write_bytes(b"\xff\x00: [")
    assert [result.cell.name for result in summarize(tmp_path).missing] == ["seed=0"]


def test_a_cut_line_hides_no_later_record(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    write_run(cell, [1.0, 2.0])
    log = cell.folder / "log.jsonl"
    log.write_text('7\n{"epoch": 0, "st\n' + log.read_text())
    assert read_cell(cell).numbers["test_top1"] == 2.0


def test_no_cell_done_makes_tables_and_no_plot(tmp_path: Path) -> None:
    make_sweep(tmp_path, "seed=0..1")
    assert [path.name for path in write_summary(summarize(tmp_path))] == ["summary.csv", "summary.md"]
    assert "- seed=1 not begun\n" in (tmp_path / "summary.md").read_text()


def test_the_files_are_written_beside_the_sweep(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "student.plan=[*: linear; 0,1: softmax]").cells
    write_run(cell, [1.0, 2.0])
    summary = summarize(tmp_path)
    assert write_summary(summary) == [tmp_path / f"summary.{suffix}" for suffix in ("csv", "md", "png")]
    assert table(summary)[0]["student.plan"] == "*: linear; 0,1: softmax"
    assert (tmp_path / "summary.csv").read_text() == to_csv(summary)
    with Image.open(tmp_path / "summary.png") as image:
        assert image.size[0] == 1200
    assert list(tmp_path.glob(".*")) == []


def test_bars_in_values_do_not_break_the_table(tmp_path: Path) -> None:
    make_sweep(tmp_path, "trainable=a|b,c")
    assert "| a\\|b | 0/1 |" in to_markdown(summarize(tmp_path))


def test_over_a_number_the_plot_has_lines(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "blr=1e-2,1e-4,1e-3", "transfer.layers=all,$first$", "seed=0..1")
    for place, cell in enumerate(sweep.cells):
        write_run(cell, [0.0, float(place)])
    summary = summarize(tmp_path)
    assert numeric_key(summary) == "optim.blr"
    (axes,) = draw(summary).axes
    assert axes.get_xscale() == "log"
    lines = [container.lines[0] for container in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[1e-4, 1e-3, 1e-2]] * 2
    assert list(lines[0].get_ydata()) == [4.5, 8.5, 0.5]  # cells 4 and 5, 8 and 9, 0 and 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["layers=all", r"layers=\$first\$"]
    write_summary(summary)


@pytest.mark.parametrize(
    "words",
    [
        ["blr=1,2", "temperature=1,2"],
        ["layers=all,first:2"],
        ["blr=1,2", f"label_seed={','.join('a' * n for n in range(1, 9))}"],
    ],
)
def test_otherwise_a_point_a_setting(tmp_path: Path, words: list[str]) -> None:
    sweep = make_sweep(tmp_path, *words)
    for cell in sweep.cells:
        write_run(cell, [1.0, 2.0])
    (axes,) = draw(summarize(tmp_path)).axes
    assert len(axes.get_yticklabels()) == len(sweep.cells)
    assert len(axes.containers) == len(sweep.cells)


def test_the_plot_shows_the_average_where_there_is_one(tmp_path: Path) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    write_run(cell, [1.0, 2.0], ema=[3.0, 4.0])
    (axes,) = draw(summarize(tmp_path)).axes
    assert axes.get_xlabel().startswith("top-1 of the average")
    assert list(axes.containers[0].lines[0].get_xdata()) == [4.0]


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is not a sweep"):
            summarize(folder)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"sweep\.json cannot be read"):
        summarize(tmp_path)
