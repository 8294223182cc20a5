"""The report says what the numbers say, needs nothing beside it, and can be read without seeing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from graftvit.launch.cli import main
from graftvit.transfer.analysis.demo import demo_cells as text
from graftvit.transfer.analysis.demo.demo_cells import (
    DemoResults,
    Gaze,
    MethodResult,
    TeacherName,
    demo_cells,
    recipe,
)
from graftvit.transfer.analysis.demo.demo_report import GAZE_TITLES, render_html, report_plots, write_report

Key = tuple[str, TeacherName | None]
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
    maps = {name: np.full((2, 2), 0.25) for name in GAZE_TITLES}
    found = DemoResults(
        methods=methods, divergences=divergences, gazes=[Gaze(np.eye(4), (0, 1), "layer 1", maps)],
        seeds=range(seeds), labels=40, all_labels=1297, test_images=500, teacher_top1=98.4,
        teacher_steps={"supervised": 1200, "mae": 2000}, student_steps=200, minutes=4.2, quick=False,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Every address and every alternative text of a page; complains about tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href"):
                self.addresses.append(value or "")
            if name == "alt":
                self.alts.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(results(), tmp_path_factory.mktemp("demo") / "new").parent


def test_the_page_needs_nothing_beside_it_and_every_picture_has_words(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert len(page.addresses) == 6  # three pictures, in two inks
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.alts) == 3
    assert all(len(alt) > 40 for alt in page.alts)
    assert "http" not in re.sub(r"base64,[\w+/=]+|http-equiv", "", html)
    assert not re.search("{[{%#]", html), "the template is filled in"
    assert "prefers-color-scheme: dark" in html


def test_both_reports_hold_the_same_numbers(folder: Path) -> None:
    markdown = (folder / "report.md").read_text()
    page = " ".join(Page((folder / "report.html").read_text()).words)
    for number in (
        "82.0 % ± 2.8",
        "93.5 % ± 2.1",
        "90.0 % ± 0.0",
        "84.0 % ± 1.4",
        "83.0 % ± 5.7",
        "91.5 % ± 0.7",
        "+8.0",
        "+9.5",
        "1,297",
        "98.4 %",
    ):
        assert number in markdown
        assert number in page
    assert "| Attention distillation | 83.0 % ± 5.7 | +1.0 ± 2.0 | 79.0 | 87.0 |" in markdown
    for image in re.findall(r"\]\((images/\w+\.png)\)", markdown):
        assert (folder / image).read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (folder / "images").iterdir()} == {
        "curves",
        "maps",
        "divergence",
        "summary",
    }
    assert all(words in page for words in text.WHAT.values())


def test_the_finding_follows_the_numbers() -> None:
    found = text.answer(results(TOP1 | {("copy", "mae"): (83.0, 86.0)}))
    assert "93.5 % (+11.5 ± 0.5 points against scratch, better with 2 of 2 seeds) when it is copied" in found
    assert "84.5 % (+2.5 ± 0.5 points against scratch, better with 2 of 2 seeds) when it is copied" in found
    assert "(+1.0 ± 2.0 points against scratch, better with 1 of 2 seeds; so few seeds cannot tell" in found


def test_a_method_that_loses_is_said_to_lose() -> None:
    found = text.answer(results(TOP1 | {("copy", "supervised"): (70.0, 75.0)}))
    assert "(\N{MINUS SIGN}9.5 ± 0.5 points against scratch, better with 0 of 2 seeds)" in found


def test_one_seed_claims_no_deviation() -> None:
    single = results({key: values[:1] for key, values in TOP1.items()}, quick=True)
    page = " ".join(Page(render_html(single, report_plots(single))).words)
    assert "±" not in page
    assert "one seed, so there is no deviation" in page
    assert "quick run" in page
    assert "each seed" not in page


def test_the_setting_in_words_is_that_of_the_recipes(tmp_path: Path) -> None:
    teacher, student = (recipe(f"digits_{name}", tmp_path, {}) for name in ("pretrain", "distill"))
    words, shape = text.setting(results()), student.student.model_args
    for cell in demo_cells(tmp_path, (0,), quick=False):
        model = cell.config.student
        if model.model != "auto":  # the teacher's own
            assert (model.model_args, model.img_size) == (shape, student.student.img_size)
        assert model.pos_embed_std == student.student.pos_embed_std
    assert "1,200 steps" in words
    assert "2,000 steps" in words
    patches = (int(str(student.student.img_size)) // shape["patch_size"]) ** 2
    assert f"enlarged to {student.student.img_size} by" in words
    assert f"cut into {patches} patches" in words
    assert f"width {shape['embed_dim']}, {shape['depth']} blocks, {shape['num_heads']} heads" in words
    assert f"with {patches - round(patches * teacher.pretrain.mask_ratio)} of {patches} patches" in words
    assert f"published {student.transfer.weight:.0f}, on {student.transfer.layers} layers" in words
    assert f"deviation of {student.student.pos_embed_std} because" in words


@pytest.mark.parametrize("line", re.findall(r"^graftvit (?:pre)?train .*", text.COMMANDS, re.MULTILINE))
def test_the_commands_that_the_report_ends_with_are_valid(line: str) -> None:
    words = line.removeprefix("graftvit ").replace("--dry_run", "").split()
    assert main([*words, "--print_config"]) == 0
