"""The Python of README.md on small weights, and the notebooks as their readers run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny_weights import write_stand_in

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
CLAIMS = {
    "start": "assert found['distilled'].top1 > found['scratch'].top1 + 3",
    "copy_and_distill": "assert all(after[name] < before[name] / 2 for name in before)",
    "convert_and_hybrid": "assert found['hybrid'].top1 > found['teacher'].top1 - 3 and alone[kept] > alone[1] * 2",
    "look_at_attention": "assert (rows - 1).abs().max() < 1e-5 and max(seen.numbers['js']) < 0.05",
    "several_teachers": """
top1 = {name: accuracy(student, test_images, test_labels) for name, student in found.items()}
assert top1["both"] > max(top1["attention"], top1["answers"]) + 0.1
""",
    "deploy": "assert (graph(test_images) - model(test_images)).abs().max() < 1e-4",
}
"""By notebook: what its text says of its numbers."""


def read(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return cells


def kinds_of(cells: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Return what the outputs of each cell of code are: text, numbers or pictures."""
    code = (cell for cell in cells if cell["cell_type"] == "code")
    return [[sorted(out.get("data", [out.get("name", "error")])) for out in cell["outputs"]] for cell in code]


def test_each_notebook_is_listed_was_run_and_is_small() -> None:
    index = (ROOT / "docs" / "notebook.md").read_text()
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == CLAIMS.keys()
    for name in CLAIMS:
        cells = read(name)
        assert f"](notebooks/{name}.ipynb)" in index
        counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
        assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"
        assert not {"stderr", "error"} & {kind for cell in kinds_of(cells) for out in cell for kind in out}
        assert len(json.dumps([cell.get("outputs") for cell in cells])) < 80_000  # 60 kB of pictures as text
        assert "## What next\n" in cells[-1]["source"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_a_notebook_runs_and_shows_what_its_text_says(name: str, tmp_path: Path) -> None:
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="notebooks need pip install '.[docs]'")
    from notebooks import run

    *cells, _ = run(NOTEBOOKS / f"{name}.ipynb", tmp_path, CLAIMS[name]).cells
    assert kinds_of(cells) == kinds_of(read(name)), "run `make notebooks`"


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
