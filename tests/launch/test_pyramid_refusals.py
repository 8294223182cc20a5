"""What the commands and modes say of a pyramid where they know plain vision transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import attention_shape, token_layout
from support.models.pyramids import TINY, arguments, tiny

DATA = ["--dataset", "digits"]


@pytest.fixture(scope="module", params=["svt", "swin"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pyramid and its conversion."""
    root, kind = tmp_path_factory.mktemp("pyramid"), request.param
    teacher = tiny(kind, num_classes=10)
    shown = Preprocessing.of(teacher, input_size=(3, 32, 32))
    how = {
        "architecture": TINY[kind][0],
        "model_args": arguments(kind, num_classes=10),
        "preprocessing": shown,
    }
    write_student(teacher, root / "teacher", **how)
    write_student(
        convert(teacher, "stage1: linear", without=["bias"]), root / "student", **how
    )  # knows its plan
    return root


@pytest.mark.parametrize("kind", TINY)
def test_questions_with_one_answer_for_all_layers_are_refused(kind: str) -> None:
    for ask in (attention_shape, token_layout):
        with pytest.raises(UnsupportedModelError, match="has no single list of equal attention layers"):
            ask(tiny(kind))


@pytest.mark.slow
def test_a_converted_pyramid_is_trained_on_labels(folders: Path, tmp_path: Path) -> None:
    import graftvit

    words = ["train", "--mode", "finetune", "--student.model", f"local-dir:{folders / 'student'}", *DATA]
    assert (
        main(
            [
                *words,
                "--output_dir",
                str(tmp_path),
                "--epochs",
                "1",
                "--warmup_epochs",
                "0",
                "--batch_size",
                "512",
            ]
        )
        == 0
    )
    trained = graftvit.load(str(tmp_path / "student"))
    assert plan_of(trained) == plan_of(graftvit.load(str(folders / "student")))
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            trained.parameters(), graftvit.load(str(folders / "student")).parameters(), strict=True
        )
    )
