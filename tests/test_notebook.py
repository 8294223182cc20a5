"""The Python of README.md and of docs/notebook.md, on small weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny_weights import write_stand_in

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notebook.md"
TEACHER = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.slow
def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(cells) == 4
    assert sum(len(cell.splitlines()) for cell in cells) < 42
    stand_in = write_stand_in(TEACHER, tmp_path / "teacher", {"depth": 2}, 2)
    names: dict[str, Any] = {}
    assert TEACHER in cells[0]
    exec(cells[0].replace(TEACHER, stand_in).replace("num_classes=2)", "num_classes=2, depth=2)"), names)
    for cell in cells[1:]:
        exec(cell, names)
    assert names["out"].terms.keys() == {"distill", "feature"}
    assert names["seen"].numbers["pairs"] == [0, 1]
    assert set(names["seen"].figures) > {"image_0_cls.png", "image_1_cls_teacher.png"}
    assert torch.isfinite(names["cheap"](names["images"])).all()


def test_the_lines_of_the_front_page_run(tmp_path: Path) -> None:
    (cell,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    size = {"embed_dim": 12, "num_heads": 2}
    name = "vit_base_patch16_224.mae"
    stand_in = write_stand_in(name, tmp_path / "teacher", size, 0)
    assert name in cell
    batch = (torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    names: dict[str, Any] = {"loader": [batch], "criterion": torch.nn.functional.cross_entropy}
    exec(cell.replace(name, stand_in).replace("num_classes=1000", f"num_classes=1000, **{size}"), names)
    assert names["out"].parts.keys() == {f"layer{layer:02}" for layer in range(9)}
    assert type(names["student"].blocks[0].attn).__module__.startswith("timm.")
    assert torch.isfinite(names["cheap"](batch[0])).all()
