"""What is checked before anything large is read."""

from __future__ import annotations

import pytest
from graftvit.models.errors import DataError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import build as building


def test_a_missing_data_set_is_refused_before_the_teacher_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    teacher = {"source": "vit_tiny_patch16_224.augreg_in21k"}
    with pytest.raises(DataError, match="/nowhere does not exist"):
        building.build(RunConfig(teacher=teacher, data={"data_path": "/nowhere"}))
    with pytest.raises(DataError, match=r"data\.data_path is not set"):
        building.build(RunConfig(teacher=teacher))


def test_all_processes_match_heads_on_the_same_images() -> None:
    config = RunConfig(
        mode="transfer",
        data={"dataset": "digits", "batch_size": 8, "workers": 0, "aa": "affine"},
        student={
            "model": "vit_tiny_patch16_224",
            "img_size": 8,
            "model_args": {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        },
    )
    spec = building.InputSpec((1, 8, 8), (0.5,), (0.5,))
    first = building._calibration(config, spec)
    loaders = [building.create_train_loader(config.data, spec, seed=0, rank=r, world_size=2) for r in (0, 1)]
    own = [next(loader.epoch(0))[0] for loader in loaders]
    assert first.equal(building._calibration(config, spec))
    assert not own[0].equal(own[1])
