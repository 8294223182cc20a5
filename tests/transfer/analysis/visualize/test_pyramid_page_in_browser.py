"""The page of a pyramid in a real browser: windows and reduced keys lie in the image where their layer has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert
from graftvit.models.merges import merge_layers
from graftvit.transfer.analysis.layer_maps import layer_maps, trace
from graftvit.transfer.analysis.visualize.map_page import read_images, to_tensor
from graftvit.transfer.analysis.visualize.visualize import look, visualize
from support.models.pyramids import TINY, arguments, tiny
from support.models.visualize_models import chain, picture
from support.runs.browser import Page, browser, find_browser

pytest.importorskip("websocket", reason="websocket-client is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
SIZE = (40, 24)


def choose(page: Page, control: str, value: object) -> None:
    page.run(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = '{value}'; "
        "c.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_click_shows_what_the_layer_attends_to(kind: str, tmp_path: Path) -> None:
    find_browser()
    sources = {
        "teacher": tiny(kind, SIZE),
        "student": convert(tiny(kind, SIZE), "1: none; 2: linear", without=["bias"]),
    }
    for name, model in sources.items():
        shown = Preprocessing.of(model, input_size=(3, *SIZE))
        write_student(
            model,
            tmp_path / name,
            architecture=TINY[kind][0],
            model_args=arguments(kind, SIZE),
            preprocessing=shown,
        )
    image = picture(tmp_path / "x.png", size=(24, 40))
    student, teacher = (f"local-dir:{tmp_path / name}" for name in ("student", "teacher"))
    index = visualize(student, [image], tmp_path / "out", teacher=teacher).page
    expected: dict[str, Any] = {}
    for name in sources:
        loaded = load_pretrained(f"local-dir:{tmp_path / name}")
        tensor = to_tensor(read_images([image], loaded.preprocessing)[0].original, loaded.preprocessing)
        expected[name] = layer_maps(loaded.model, tensor, range(4))
    with browser(tmp_path) as page:
        page.open(index)
        assert page.run("document.querySelector('#layer').options[2].text").startswith("layer 2, stage ")
        choose(page, "layer", 0)
        page.click("#panel-teacher .stage", 5.5 / 6, 4.5 / 10)  # row 4, column 5 of the first stage
        for layer in range(3):
            choose(page, "layer", layer)
            for name, maps in expected.items():
                row = page.run(f"shownRow('{name}')")
                if layer not in maps:
                    assert row is None
                    said = page.run(f"document.querySelector('#panel-{name} .told').textContent")
                    assert said == "This layer has no attention."
                    continue
                rows, columns = maps[layer].places.geometry.grid
                token = (4 * rows // 10) * columns + 5 * columns // 6
                weights = maps[layer].dense()[0, :, token].mean(0).numpy()
                np.testing.assert_allclose(row, weights, atol=weights.max() / 200)
                canvas = f"document.querySelector('#panel-{name} canvas')"
                size = page.run(f"[{canvas}.height, {canvas}.width]")
                assert tuple(size) == maps[layer].places.grid
        choose(page, "head", "rollout")
        assert sum(page.run("shownRow('student')")) == pytest.approx(1, abs=0.02)
        assert page.errors == []


def test_a_click_shows_the_places_that_merges_read(tmp_path: Path) -> None:
    find_browser()
    model = convert(tiny("swin", SIZE), "merge: deformable")
    for merge in merge_layers(model):
        merge.dconv.conv_offset.bias.data += torch.arange(8.0) / 3 - 1
    described = {"architecture": TINY["swin"][0], "model_args": arguments("swin", SIZE)}
    write_student(
        model, tmp_path / "lit", preprocessing=Preprocessing.of(model, input_size=(3, *SIZE)), **described
    )
    image = picture(tmp_path / "x.png", size=(24, 40))
    source = f"local-dir:{tmp_path / 'lit'}"
    index = visualize(source, [image], tmp_path / "out").page
    loaded = load_pretrained(source)
    tensor = to_tensor(read_images([image], loaded.preprocessing)[0].original, loaded.preprocessing)
    [seen] = look(loaded.model, tensor).merges
    drawn = "document.querySelector('.stage .places').getAttribute('d')"
    with browser(tmp_path) as page:
        page.open(index)
        assert page.run(drawn) == ""
        page.click("#panel-student .stage", 5.5 / 6, 4.5 / 10)
        for choice, expected in {
            "0:one": seen.in_image()[2, 2],
            "0:all": seen.in_image().flatten(0, 2),
            "": torch.empty(0, 2),
        }.items():
            choose(page, "merge", choice)
            points = re.findall(r"M(\S+) (\S+)h0", page.run(drawn))
            found = np.array(points, dtype=np.float64).reshape(-1, 2)[:, ::-1]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
        merges = chain(3, (16, 24), 3)
        given = [
            {"grid": each.merged, "token": each.token, "read": each.in_image().flatten().tolist()}
            for each in merges
        ]
        for token in np.ndindex(merges[2].merged):
            followed = np.reshape(page.run(f"traced({json.dumps(given)}, {list(token)})"), (-1, 2))
            np.testing.assert_allclose(followed, trace(merges, token).numpy(), atol=1e-6)
        assert any(len(trace(merges, token)) for token in np.ndindex(merges[2].merged))
        assert page.errors == []
