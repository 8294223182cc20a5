"""The comparison that stands between an exported file and its place: what passes, and what cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graftvit.checkpoints import export_graph as check
from graftvit.checkpoints.export_graph import ExportFailedError, compare
from torch import Tensor, nn


def test_only_a_close_output_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "model.pt2", (1, 3, 4, 4)

    def error(output: Tensor, reference: Tensor) -> float:
        monkeypatch.setattr(check, "run_torch", lambda path: lambda images: output)
        model = nn.Identity()
        monkeypatch.setattr(model, "forward", lambda images: reference)
        return compare(model, path, "torch", [x], 1e-4)

    good = torch.tensor([[1.0, 2.0], [1e-3, 2e-3]])
    assert error(good, good) == 0
    assert error(good * (1 + 5e-5), good) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(ExportFailedError, match=r"relative error is 1.*e-03"):
        error(good + torch.tensor([[0.0, 0.0], [0.0, 3e-6]]), good)  # small beside the first image's output
    with pytest.raises(ExportFailedError, match="inf"):
        error(good[:1], good)
    with pytest.raises(ExportFailedError, match="inf"):
        error(good * np.nan, good)
    with pytest.raises(ExportFailedError, match="the model itself gives numbers that are not finite"):
        error(good, good * np.inf)
    monkeypatch.undo()
    with pytest.raises(ExportFailedError, match="torch cannot run it"):
        compare(nn.Identity(), path, "torch", [x], 1e-4)
