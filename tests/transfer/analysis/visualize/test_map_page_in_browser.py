"""The page in a real browser: a click on a patch shows the row that the operator computes for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.transfer.analysis.layer_maps import attention_maps
from graftvit.transfer.analysis.visualize.map_page import read_images, to_tensor
from graftvit.transfer.analysis.visualize.visualize import visualize
from numpy.typing import NDArray
from support.models.visualize_models import GRID, PREFIX, TOKENS, operator_inputs, picture, save, tiny
from support.runs.browser import Page, browser, find_browser

pytest.importorskip("websocket", reason="websocket-client is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]  # which starts once
PLAN = "0: mala; 1: linear"
STUDENT = "#panel-student .stage"


class Shown:
    """The page in the browser, with the sources and the image that it was made of."""

    def __init__(self, page: Page, student: str, teacher: str, image: str) -> None:
        self.page, self.student, self.teacher, self.image = page, student, teacher, image

    def row(self, name: str = "student") -> NDArray[Any]:
        return np.array(self.page.run(f"shownRow('{name}')"))

    def choose(self, control: str, value: object) -> None:
        """Sets a control as a hand would."""
        self.page.run(
            f"(() => {{ const c = document.getElementById('{control}'); c.value = '{value}'; "
            "c.dispatchEvent(new Event('input', {bubbles: true})) })()"
        )

    def heat(self, name: str = "student") -> NDArray[Any]:
        """The colours on the canvas over the image, (patches, 3)."""
        pixels = self.page.run(
            f"(() => {{ const c = document.querySelector('#panel-{name} .stage canvas'); "
            "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) })()"
        )
        return np.array(pixels).reshape(-1, 4)[:, :3]

    def operator_row(self, layer: int, head: int, token: int) -> NDArray[Any]:
        """The row by the operator's own `rows`, from the model as loaded."""
        loaded = load_pretrained(self.student)
        spec = loaded.preprocessing
        image = to_tensor(read_images([self.image], spec)[0].original, spec)
        operator, heads = operator_inputs(loaded.model, image, layer)
        with torch.no_grad():
            row: NDArray[Any] = operator.rows(heads, torch.tensor([token]))[0, head, 0].numpy()
        return row


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    find_browser()
    folder = tmp_path_factory.mktemp("page")
    student, teacher = save(tiny(PLAN), folder / "student"), save(tiny(), folder / "teacher")
    image = picture(folder / "a<b.png")
    index = visualize(student, [image], folder / "out", teacher=teacher).page
    with browser(folder) as page:
        page.open(index)
        assert page.run("state.shared && document.getElementById('scale').checked")
        page.run("document.getElementById('scale').click()")  # each panel by itself, for the tests below
        yield Shown(page, student, teacher, image)


@pytest.mark.parametrize(("layer", "head", "row", "column"), [(0, 1, 1, 2), (1, 0, 3, 5), (0, 0, 0, 0)])
def test_a_click_shows_the_row_of_the_operator(
    shown: Shown, layer: int, head: int, row: int, column: int
) -> None:
    shown.choose("layer", layer)
    shown.choose("head", head)
    shown.page.click(STUDENT, (column + 0.5) / GRID[1], (row + 0.5) / GRID[0])
    expected = shown.operator_row(layer, head, PREFIX + row * GRID[1] + column)
    found = shown.row()
    assert found.shape == (TOKENS,)
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 250)
    signed = layer == 0  # mala has negative weights
    patches = found[PREFIX:] / np.abs(found[PREFIX:]).max()
    places = np.rint(255 * ((patches + 1) / 2 if signed else patches)).astype(int)
    colours = mpl.colormaps["RdBu_r" if signed else "magma"](np.arange(256))[places, :3]
    assert np.abs(shown.heat() - 255 * colours).max() <= 8  # a step of the colour scale


def test_the_teacher_answers_beside(shown: Shown) -> None:
    shown.choose("layer", 1)
    shown.choose("head", "mean")
    shown.page.click("#panel-teacher .stage", 1.5 / GRID[1], 2.5 / GRID[0])
    loaded = load_pretrained(shown.teacher)
    spec = loaded.preprocessing
    image = to_tensor(read_images([shown.image], spec)[0].original, spec)
    heads = attention_maps(loaded.model, image)[1][0][:, PREFIX + 2 * GRID[1] + 1].numpy()
    np.testing.assert_allclose(shown.row("teacher"), heads.mean(0), atol=heads.max() / 250)
    assert not np.allclose(shown.row("teacher"), shown.row("student"), atol=1e-3)


def test_keys_and_buttons(shown: Shown) -> None:
    shown.choose("layer", 1)
    shown.page.click(STUDENT, 0.5 / GRID[1], 0.5 / GRID[0])
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "PageUp"):
        shown.page.press(key)
    assert shown.page.run("[tokenOf(layerOf('student')), state.layer]") == [PREFIX + 2 * GRID[1], 0]
    assert "Patch 12 (row 2, column 0) attends" in shown.page.run(
        "document.querySelector('.told').textContent"
    )
    shown.choose("head", 0)
    shown.page.click("#panel-student .prefix button:nth-child(2)")
    expected = shown.operator_row(0, 0, 1)
    np.testing.assert_allclose(shown.row(), expected, atol=np.abs(expected).max() / 250)


def test_opacity_and_one_scale(shown: Shown) -> None:
    shown.choose("opacity", 35)
    assert shown.page.run("document.querySelector('.stage canvas').style.opacity") == "0.35"
    highs = "[...document.querySelectorAll('.bar')].map((bar) => bar.lastChild.textContent)"
    shown.choose("layer", 1)
    shown.page.click(STUDENT)
    assert len(set(shown.page.run(highs))) == 2
    shown.page.click("#scale")
    assert len(set(shown.page.run(highs))) == 1


def test_nothing_is_asked_of_the_network_and_nothing_fails(shown: Shown) -> None:
    assert {address.partition(":")[0] for address in shown.page.requests} <= {"file", "data"}
    assert shown.page.errors == []
    assert shown.page.run("document.querySelector('#image').options[0].text") == "a_b"
