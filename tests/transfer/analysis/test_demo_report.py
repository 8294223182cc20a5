"""The demo's report says what the numbers say, in the page and in Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graftvit.launch.cli import main
from graftvit.transfer.analysis import demo as demo_report
from graftvit.transfer.analysis.compare.student_cell import CellMaps
from graftvit.transfer.analysis.demo import (
    COLORS,
    MODELS,
    DemoResults,
    MethodResult,
    accuracy_table,
    draw_curves,
    draw_divergence,
    draw_summary,
    make_report,
    write_report,
)
from graftvit.transfer.analysis.demo_cells import DATA_SETS, DemoData, TeacherName, demo_cells
from graftvit.transfer.analysis.report.ink import Panel, to_png

Key = tuple[str, TeacherName | None]
TEMPLATE = Path(demo_report.__file__).with_name("demo.txt").read_text()
TOP1: dict[Key, tuple[float, ...]] = {
    ("scratch", None): (80.0, 84.0),
    ("copy", "supervised"): (92.0, 95.0),
    ("distill", "supervised"): (93.0, 98.0),
    ("finetune", "mae"): (90.0, 90.0),
    ("copy", "mae"): (83.0, 85.0),
    ("distill", "mae"): (79.0, 87.0),
    ("ensemble", "mae"): (91.0, 92.0),
}


def results(top1: dict[Key, tuple[float, ...]] | None = None, **changes: object) -> DemoResults:
    numbers = top1 or TOP1
    seeds = len(numbers["scratch", None])
    methods = [
        MethodResult(
            method,
            teacher,
            values,
            steps=() if method == "ensemble" else (100, 200),
            curve=[] if method == "ensemble" else [(40.0, value) for value in values],
        )
        for (method, teacher), values in numbers.items()
    ]
    divergences = {
        name: {method: [(0.1, 0.2)] * seeds for method, of in numbers if of in (name, None)}
        for name in ("supervised", "mae")
    }
    maps = {(0, layer): Panel(np.full((2, 2), 0.25), (1.0, 1.0), (2, 2), (0, 1)) for layer in (1, 3)}
    found = DemoResults(
        methods=methods, divergences=divergences,
        maps={name: CellMaps("the brightest patch", [np.eye(4)], maps) for name in MODELS.values()},
        seeds=range(seeds), labels=40, all_labels=1297, test_images=500, teacher_top1=98.4,
        teacher_steps={"supervised": 1200, "mae": 2000}, student_steps=200, minutes=4.2, quick=False,
        data=DATA_SETS["digits"],
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def text_of(found: DemoResults) -> str:
    return make_report(found).to_markdown()


def test_both_reports_hold_the_same_numbers(tmp_path: Path) -> None:
    page = write_report(results(), tmp_path / "new")
    markdown, html = (page.with_suffix(suffix).read_text() for suffix in (".md", ".html"))
    numbers = (
        "82.0 % ± 2.8|93.5 % ± 2.1|90.0 % ± 0.0|84.0 % ± 1.4|83.0 % ± 5.7|91.5 % ± 0.7|+8.0|+9.5|1,297|98.4 %"
    )
    for number in numbers.split("|"):
        assert number in markdown
        assert number in html
    assert "| Attention distillation | 83.0 % ± 5.7 | +1.0 ± 2.0 | 79.0 | 87.0 |" in markdown
    pictures = {path.stem for path in (tmp_path / "new" / "images").iterdir()}
    assert pictures == {"curves", "maps", "divergence", "summary"}
    assert all(len(figure.alt) > 40 for figure in make_report(results()).figures)


def test_the_finding_follows_the_numbers() -> None:
    found = text_of(results(TOP1 | {("copy", "mae"): (83.0, 86.0)}))
    assert "93.5 % (+11.5 ± 0.5 points against scratch, better with 2 of 2 seeds) when it is copied" in found
    assert "84.5 % (+2.5 ± 0.5 points against scratch, better with 2 of 2 seeds) when it is copied" in found
    assert "(+1.0 ± 2.0 points against scratch, better with 1 of 2 seeds; so few seeds cannot tell" in found
    lost = text_of(results(TOP1 | {("copy", "supervised"): (70.0, 75.0)}))
    assert "(\N{MINUS SIGN}9.5 ± 0.5 points against scratch, better with 0 of 2 seeds)" in lost


def test_one_seed_claims_no_deviation() -> None:
    single = results({key: values[:1] for key, values in TOP1.items()}, quick=True)
    found = text_of(single)
    assert "±" not in found
    assert "one seed, so there is no deviation" in found
    assert "quick run" in found
    assert list(accuracy_table(single).head) == ["method", "top-1", "against scratch"]


@pytest.mark.parametrize("data", DATA_SETS.values(), ids=list(DATA_SETS))
def test_the_setting_in_words_is_that_of_the_cells(data: DemoData, tmp_path: Path) -> None:
    cells = demo_cells(tmp_path, (0,), quick=False, data=data, data_path=tmp_path)
    teacher = next(cell.config for cell in cells if cell.teacher == "mae")
    student = next(cell.config for cell in cells if cell.method == "distill")
    words, shape = " ".join(text_of(results(data=data)).split()), student.student.model_args
    for cell in cells:
        model = cell.config.student
        if model.model != "auto":  # the teacher's own
            assert (model.model_args, model.img_size) == (shape, student.student.img_size)
        assert model.pos_embed_std == student.student.pos_embed_std
    assert "1,200 steps" in words
    assert "2,000 steps" in words
    patches = (int(str(student.student.img_size)) // shape["patch_size"]) ** 2
    assert f"{student.student.img_size} by {student.student.img_size}" in words
    assert f"cut into {patches} patches" in words
    assert f"width {shape['embed_dim']}, {shape['depth']} blocks, {shape['num_heads']} heads" in words
    assert f"with {patches - round(patches * teacher.pretrain.mask_ratio)} of {patches} patches" in words
    assert f"published {student.transfer.weight:.0f}, on {student.transfer.layers} layers" in words
    if data.name == "digits":
        assert f"deviation of {student.student.pos_embed_std} because" in words


def test_a_report_of_photographs_does_not_speak_of_digits() -> None:
    found = text_of(results(data=DATA_SETS["fashion_mnist"], quick=True))
    told = found[: found.index("Go on with")].replace("that of the demo on digits", "")
    assert "40 labelled product photographs" in told
    assert "digit" not in told
    assert "graftvit demo --dataset fashion_mnist --quick: 4.2 minutes" in found
    assert "without a network" not in found
    assert "without a network" in text_of(results())


@pytest.mark.parametrize("line", re.findall(r"^graftvit (?:pre)?train .*", TEMPLATE, re.MULTILINE))
def test_the_commands_that_the_report_ends_with_are_valid(line: str) -> None:
    words = line.removeprefix("graftvit ").replace("--dry_run", "").split()
    assert main([*words, "--print_config"]) == 0


def test_a_line_is_the_mean_and_its_band_one_sample_deviation() -> None:
    for draw in (draw_curves, draw_divergence):
        axes = draw(results(), "light").axes[0]
        low, high = axes.get_ylim()
        line = next(each for each in axes.lines if each.get_label() == "copied")
        assert line.get_color() == COLORS["copy"]
        assert low < line.get_ydata()[-1] < high
    (copied,) = (
        each for each in draw_curves(results(), "light").axes[0].lines if each.get_label() == "copied"
    )
    np.testing.assert_allclose(copied.get_ydata(), [40.0, 93.5])


def test_the_summary_shows_means_as_strokes_and_seeds_as_dots() -> None:
    figure = draw_summary(results(), "light")
    axes = figure.axes[0]
    drawn = [(line.get_marker(), list(line.get_xdata()), line.get_color()) for line in axes.lines[-2:]]
    assert drawn == [("o", [80.0, 84.0], COLORS["scratch"]), ("|", [82.0], COLORS["scratch"])]
    labels = [(label.get_text(), label.get_fontweight()) for label in axes.get_yticklabels()]
    assert labels[-3:] == [
        ("copied  94", "normal"),
        ("the teacher knows the labels", "bold"),
        ("scratch  82", "normal"),
    ]
    assert [each.get_ylabel() for each in figure.axes[2:]] == list(MODELS.values())
    assert len(to_png(figure)) > 10_000
