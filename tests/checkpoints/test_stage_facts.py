"""What `teacher info` says of a pyramid."""

from __future__ import annotations

from pathlib import Path

from graftvit.checkpoints.describe import teacher_facts
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert
from support.models.pyramids import TINY, arguments, tiny


def test_each_stage_has_its_line(tmp_path: Path) -> None:
    model = convert(tiny("pvt", (32, 48)), "stage1: none")
    shown = Preprocessing.of(model, input_size=(3, 32, 48))
    write_student(
        model,
        tmp_path / "student",
        architecture=TINY["pvt"][0],
        model_args=arguments("pvt"),
        preprocessing=shown,
    )
    facts = teacher_facts(load_pretrained(str(tmp_path / "student")))
    assert facts["depth"] == "3 blocks"
    assert facts["stage 1"] == "1 block without attention, model width 8, grid 8 x 12"
    assert facts["stage 2"] == "2 blocks with 2 heads of width 8, model width 16, grid 4 x 6"
