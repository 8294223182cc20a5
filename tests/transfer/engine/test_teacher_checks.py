"""Mistakes in which teacher teaches what: the sentence names the real one, and the place of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.models.errors import GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.resume_check import check_same_run, settings
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_convnext, make_teacher


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    five = make_teacher(folder / "five", classes=5)
    made = {"vit": make_teacher(folder / "vit"), "convnext": make_convnext(folder / "convnext"), "five": five}
    return {name: f"local-dir:{path}" for name, path in made.items()}


def run_with(
    folder: Path,
    sources: dict[str, str],
    teacher: str | None,
    other: str | None,
    transfer: dict[str, Any],
    **of_c: Any,
) -> RunConfig:
    """A run with the teachers of these names: the section `teacher`, and one that is called `c`."""
    sections: dict[str, Any] = {"mode": "transfer", "transfer": transfer}
    if teacher is not None:
        sections["teacher"] = {"source": sources[teacher]}
    if other is not None:
        sections["teachers"] = {"c": {"source": sources[other], **of_c}}
    return config(folder, **sections)


OF_C = {"losses": [{"method": "distill", "teacher": "c"}]}
LAYERS = r"method=distill reads the layers of its teacher, and ConvNeXt is not a supported model.*feature and logits"


@pytest.mark.parametrize(
    ("teacher", "other", "transfer", "message"),
    [
        ("convnext", None, {"method": "distill"}, rf"^transfer.{LAYERS}"),
        ("vit", "convnext", OF_C, rf"^transfer.losses\[0\].{LAYERS}"),  # and not that nobody uses the vit
        (None, "convnext", OF_C, rf"^transfer.losses\[0\].{LAYERS}"),
        ("vit", "vit", OF_C, "no entry of transfer.losses learns from the section teacher"),
        (None, "vit", OF_C, "no entry of transfer.losses learns from the section teacher"),
        ("vit", "convnext", {"losses": [{"method": "distill"}]}, "teachers.c teaches nothing"),
        (
            "vit",
            "five",
            {"losses": [{"method": "distill"}, {"method": "logits", "teacher": "c"}]},
            r"transfer.losses\[1\].method=logits needs one set of classes, and the teacher has 5",
        ),
        (
            "vit",
            None,
            {"losses": [{"method": "feature"}, {"method": "distill", "layers": 9}]},
            r"transfer.losses\[1\].layers='9' names layer 9",
        ),
        (
            "vit",
            None,
            {"weight": 0, "task_weight": 0},
            "task_weight=0 leaves nothing to learn.*weight of each",
        ),
        (
            "vit",
            None,
            {"losses": [{"method": "copy"}, {"method": "feature", "weight": 0}], "task_weight": 0},
            "leaves nothing to learn",
        ),
    ],
)
def test_the_real_mistake_is_named(
    teacher: str | None,
    other: str | None,
    transfer: dict[str, Any],
    message: str,
    sources: dict[str, str],
    tmp_path: Path,
) -> None:
    run = run_with(tmp_path / "run", sources, teacher, other, transfer)
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(GraftError, match=message):
            start()


def test_the_setting_of_a_further_teacher_is_named_by_its_own_key(
    sources: dict[str, str], tmp_path: Path
) -> None:
    losses = {"losses": [{"method": "distill"}, {"method": "distill", "teacher": "c"}]}
    run = run_with(tmp_path / "run", sources, "vit", "vit", losses, img_size=16)
    with pytest.raises(GraftError, match=r"teachers.c.img_size.*transfer.losses\[1\].interpolate_grid=true"):
        dry_run(run, 1, here=True)


def test_a_weight_of_0_beside_labels_only_measures(sources: dict[str, str], tmp_path: Path) -> None:
    mode_of(run_with(tmp_path / "run", sources, "vit", None, {"weight": 0})).check()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            [{"method": "distill", "weight": 2.0}, {"method": "feature"}],
            r"^transfer.losses\[0\].weight=2.0, but the run in .* was started with 3.0",
        ),
        ([{"method": "feature"}, {"method": "distill"}], r"^transfer.losses\[0\].method='feature', but"),
        ([{"method": "distill"}], "^transfer.losses='1 loss', but the run in .* was started with '2 losses'"),
        ([], "^transfer.losses=.*, but the run in .* was started with '2 losses'"),
    ],
)
def test_a_run_is_not_resumed_with_other_losses(
    losses: list[dict[str, Any]], message: str, sources: dict[str, str], tmp_path: Path
) -> None:
    before = {"losses": [{"method": "distill"}, {"method": "feature"}]}
    first = run_with(tmp_path / "run", sources, "vit", None, before)
    now = run_with(tmp_path / "run", sources, "vit", None, {"losses": losses})
    saved = {"config": settings(first), "origins": {}}
    check_same_run(saved, first)
    with pytest.raises(GraftError, match=message):
        check_same_run(saved, now)
