from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from graftvit.transfer.analysis.compare.comparison_cells import Record, Score, Speed, mean_over_seeds
from graftvit.transfer.analysis.compare.comparison_plots import crossover_of, figures_of
from graftvit.transfer.analysis.compare.comparison_report import (
    accuracy_table,
    best_linear,
    cost_table,
    energy_of,
    lines_of,
    make_report,
    records_json,
    records_table,
    reference,
)
from graftvit.transfer.analysis.report.ink import to_png
from graftvit.transfer.cells import load_record, save_record
from scipy.stats import binomtest


def text_of(records: list[Record]) -> str:
    return make_report(records, []).to_markdown()


def speed(size: int, latency: float) -> Speed:
    return Speed(
        size, 4, size * size // 4 + 1, latency, latency, latency, 1e-3 * size, 10.0, 9.0, 2**20, 10**6, 10**6,
        10**7, 2 * 10**7,
    )  # fmt: skip


def record(name: str, top1: list[float], *, plan: str | None = "*: linear", linear: bool = True) -> Record:
    scores = [
        Score(stage, value, 99.0, 0.1, 2.0, 5)
        for stage, value in zip(("zero-shot", "task"), top1, strict=False)
    ]
    errors = {} if plan is None else {"zero-shot": {0: 0.9, 1: 0.8}, "task": {0: 0.2, 1: 0.1}}
    speeds = [speed(8, 9e-3), speed(16, 15e-3), speed(32, 20e-3)]
    return Record(name, plan, 8, "d", "a machine", 0.5, None, linear, 100, 7, scores, speeds, errors)


TEACHER = record("teacher", [98.0], plan=None, linear=False)
UNIFORM = record("uniform", [18.0, 78.0], plan="*: uniform")
STUDENT = record("good", [40.0, 97.0])
QUADRATIC = record("better", [60.0, 99.0], linear=False)
FAILED = replace(record("broken", []), error="it has no value")
ALL = [TEACHER, UNIFORM, STUDENT, QUADRATIC, FAILED]


def test_the_gap_is_measured_from_both_floors() -> None:
    lines = {line.record.name: line for line in lines_of(ALL)}
    assert lines["good"].gap_trained == pytest.approx(19 / 20)
    assert lines["good"].gap_zero_shot == pytest.approx(79 / 80)
    assert lines["better"].gap_trained == pytest.approx(1.05)
    assert lines["uniform"].gap_trained == 0
    assert lines["teacher"].gap_zero_shot == 1
    assert lines["broken"].gap_trained is None


def test_sizes_are_not_mixed() -> None:
    other = replace(STUDENT, size=16)
    assert lines_of([*ALL, other])[-1].gap_trained is None


def test_the_best_linear_student_is_neither_uniform_nor_quadratic() -> None:
    assert best_linear(ALL, 8) == [STUDENT]
    assert best_linear([TEACHER, UNIFORM], 8) == []


def test_without_a_teacher_softmax_is_the_reference() -> None:
    softmax = replace(record("plain", [10.0, 95.0], plan="*: softmax", linear=False), converted=False)
    assert reference([UNIFORM, STUDENT, softmax], 8) is softmax
    assert reference([UNIFORM, STUDENT], 8) is None


def test_tables_have_the_numbers_and_name_what_failed() -> None:
    text = text_of(ALL)
    assert "| good | 40.0 / 99.0 | 97.0 / 99.0 |  | 95 % | 99 % | 4 |" in text
    assert "Failed: broken at 8 px: it has no value" in text
    rows = list(csv.DictReader(io.StringIO(records_table(ALL).to_csv())))
    assert [row["name"] for row in rows] == ["teacher", "uniform", "good", "better", "broken"]
    assert float(rows[2]["task_top1"]) == 97.0
    assert rows[4]["error"] == "it has no value"
    whole = json.loads(records_json(ALL))
    assert whole[2]["gap_recovered_trained_uniform"] == pytest.approx(0.95)
    assert "95 %" in text_of(ALL)


def test_cells_of_several_seeds_are_one_row_of_means() -> None:
    def seeded(name: str, seed: int, top1: float) -> Record:
        made = record(name, [40.0, top1])
        return replace(made, seed=seed, speeds=made.speeds if seed == 0 else [])

    students = [seeded("good", seed, top1) for seed, top1 in enumerate([95.0, 96.0, 100.0])]
    floor = [seeded("uniform", seed, top1) for seed, top1 in enumerate([78.0, 80.0, 82.0])]
    broken = replace(record("good", []), seed=3, error="it has no value")
    raw = [TEACHER, *floor, *students, broken]
    means = mean_over_seeds(raw)
    assert [(each.name, each.seeds, each.seed) for each in means] == [
        ("teacher", 1, None), ("uniform", 3, None), ("good", 3, None), ("good", 1, 3)
    ]  # fmt: skip
    good = means[2].score("task")
    assert good is not None
    assert good.top1 == pytest.approx(97.0)
    assert good.deviation == pytest.approx(7**0.5)  # of 95, 96 and 100 with two degrees of freedom
    assert means[2].speeds == students[0].speeds
    text = text_of(means)
    assert "| good | 40.0 ± 0.0 / 99.0 | 97.0 ± 2.6 / 99.0 |  | 94 % |" in text
    assert "Failed: good at 8 px, seed 3: it has no value" in text
    assert "means over 3 seeds" in text_of(means)
    rows = list(csv.DictReader(io.StringIO(records_table(raw).to_csv())))
    assert [row["seed"] for row in rows] == ["", "0", "1", "2", "0", "1", "2", "3"]
    gaps = [line.gap_trained for line in lines_of(raw)]
    assert gaps[5] == pytest.approx((96 - 80) / (98 - 80))  # against uniform attention of the same seed


def test_the_energy_is_that_of_multiplications_and_additions() -> None:
    known = replace(STUDENT, speeds=[speed(8, 9e-3)])
    teacher = replace(TEACHER, speeds=[])
    assert energy_of(speed(8, 9e-3)) == pytest.approx(3.7e7 + 1.8e7)
    rows = list(csv.DictReader(io.StringIO(records_table([teacher, known]).to_csv())))
    assert [row["energy_pj"] for row in rows] == ["", "55000000.0"]
    table = cost_table([teacher, known])
    assert [row[list(table.head).index("µJ")] for row in table.rows] == ["55.0"]


def test_the_crossover_lies_between_the_sizes() -> None:
    at = crossover_of(STUDENT)
    assert at is not None
    assert at.where == ""
    assert 17 < at.size < 65


def test_figures_are_drawn_of_what_was_measured() -> None:
    figures = figures_of(ALL)
    assert [figure.name for figure in figures] == [
        "accuracy_latency",
        "accuracy_memory",
        "latency_tokens",
        "layer_errors",
    ]
    for figure in figures:
        assert len(to_png(figure.draw("dark"), dots_per_inch=50)) > 3000
    assert figures_of([]) == figures_of([FAILED]) == []
    assert len(figures_of([TEACHER])) == 2


def test_a_record_comes_back_from_the_disk(tmp_path: Path) -> None:
    for each in ALL:
        save_record(each, tmp_path / each.name)
        assert load_record(Record, tmp_path / each.name) == each


def on(images: int, each: Record) -> Record:
    return replace(each, scores=[replace(score, samples=images) for score in each.scores])


def column(records: list[Record], name: str) -> dict[str, str]:
    table = accuracy_table(records)
    return {str(row[0]): str(row[list(table.head).index(name)]) for row in table.rows}


def test_an_interval_for_the_number_of_images_stands_beside_each_accuracy_and_gap() -> None:
    few, many = ([on(images, each) for each in ALL] for images in (128, 50_000))
    table = accuracy_table(few)
    column, gap = (list(table.head).index(name) for name in ("95 % interval", "gap recovered"))
    low, high = binomtest(round(0.97 * 128), 128).proportion_ci(method="wilson")
    student = next(row for row in table.rows if row[0] == "good")
    assert student[column] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert re.fullmatch(r"95 % ± \d\d", str(student[gap]))
    errors = [
        next(line.gap_error for line in lines_of(each) if line.record.name == "good") for each in (few, many)
    ]
    assert errors[0] > 10 * errors[1] > 0
    assert next(line for line in lines_of(few) if line.record.name == "teacher").gap_error is None
    assert "the 128 test images" in text_of(few)
    assert f"97.0 % (95 % interval {100 * low:.1f} to {100 * high:.1f})" in text_of(few)
    assert "on the 50,000 test images" in text_of(many)
    assert json.loads(records_json(few))[2]["top1_interval"] == pytest.approx([100 * low, 100 * high])
    assert "test_images,top1_low,top1_high" in records_table(few).to_csv()


def test_a_gap_against_untrained_uniform_attention_has_its_error() -> None:
    few = [on(128, each) for each in ALL]
    shown = column(few, "against zero-shot uniform")
    assert re.fullmatch(r"99 % ± \d", shown["good"])
    assert re.fullmatch(r"75 % ± \d+", shown["uniform"]), "its training moved it from the floor"
    assert shown["teacher"] == "100 %"
    (row,) = (
        row for row in csv.DictReader(io.StringIO(records_table(few).to_csv())) if row["name"] == "good"
    )
    error = float(row["gap_recovered_zero_shot_uniform_error"])
    assert json.loads(records_json(few))[2]["gap_recovered_zero_shot_uniform_error"] == error
    assert f"99 % (± {100 * error:.0f}) of that to uniform attention without training" in text_of(few)


def test_no_gap_is_said() -> None:
    tied = [TEACHER, record("uniform", [18.0, 98.0], plan="*: uniform"), STUDENT]
    assert {*column(tied, "gap recovered").values()} == {"no gap"}
    assert "The teacher is no better than uniform attention trained with the same budget" in text_of(tied)
    assert "no gap" in text_of(tied)
    assert {*column([TEACHER, STUDENT], "gap recovered").values()} == {""}, "nothing to measure a gap from"


def test_the_best_students_that_tie_are_all_named() -> None:
    assert "the best student of linear cost, good, 97.0 %" in text_of(ALL)
    twin = replace(STUDENT, name="twin")
    assert "the best students of linear cost, good and twin, 97.0 %" in text_of([*ALL, twin])
