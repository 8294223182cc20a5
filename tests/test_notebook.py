"""The cells of docs/notebook.md, one after another in one namespace, on small weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from support.models.tiny_weights import write_stand_in

PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"
TEACHER = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.slow
@pytest.mark.usefixtures("_figures")
def test_the_cells_run(tmp_path: Path) -> None:
    cells = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(cells) == 3
    assert sum(len(cell.splitlines()) for cell in cells) < 35
    stand_in = write_stand_in(TEACHER, tmp_path / "teacher", {"depth": 2}, 2)
    names: dict[str, Any] = {}
    assert TEACHER in cells[0]
    exec(cells[0].replace(TEACHER, stand_in).replace("num_classes=2)", "num_classes=2, depth=2)"), names)
    for cell in cells[1:]:
        exec(cell, names)
    assert names["out"].terms.keys() == {"distill", "feature"}
    shown = names["axes"][0][0].images[0].get_array()
    assert shown.shape == (14, 14)
    assert 0 < shown.sum() <= 1  # a row of a map without its class token
    assert torch.isfinite(names["cheap"](names["images"])).all()


@pytest.fixture
def _figures() -> Any:
    backend = mpl.get_backend()
    mpl.use("agg")
    yield
    mpl.pyplot.close("all")
    mpl.use(backend)
