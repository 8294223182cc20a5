"""A small Swin and a small PVTv2, from training to a student that others use, on digits and on photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import yaml
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config, read_recipe
from graftvit.launch.slurm.folder import JobFolder
from graftvit.models.converted import plan_of
from graftvit.models.families import depths
from support.files.photos import CLASSES
from support.files.plain_timm import PlainTimm
from support.models.tiny_weights import write_stand_in
from support.runs.measure import measure
from support.runs.patience import until

PVT: dict[str, Any] = {
    "embed_dims": [16, 32, 64], "depths": [1, 2, 1], "num_heads": [1, 2, 4], "sr_ratios": [4, 2, 1],
    "mlp_ratios": [4, 4, 4],
}  # fmt: skip
STUDENTS: dict[str, dict[str, Any]] = {
    "swin": {},
    "pvt": {"model": "pvt_v2_b0", "img_size": 32, "model_args": {**PVT, "in_chans": 1}},
}
"""What differs from `digits_pyramid_teacher` and `digits_pyramid_compare`."""
PLANS = ("windows", "first-none")
SWIN = {"embed_dim": 12, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}
PUBLISHED = {"swin": ("swin_tiny_patch4_window7_224.ms_in1k", SWIN), "pvt": ("pvt_v2_b0.in1k", PVT)}


@pytest.fixture(scope="module", params=list(STUDENTS))
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short comparison on digits: a teacher that was trained, and two students by stage plans."""
    folder = tmp_path_factory.mktemp(str(request.param))
    student = STUDENTS[str(request.param)]
    data = {"train_samples": 200}
    length = {"epochs": 3, "warmup_epochs": 1}
    write(folder / "teacher.yaml", "digits_pyramid_teacher", student=student, data=data, optim=length)
    plans = {name: read_recipe("digits_pyramid_compare").compare["plans"][name] for name in PLANS}
    short = {"batch_size": 4, "repeats": 2, "speed_img_size": [], "error_batches": 1}
    compare = {**short, "plans": plans, "teacher_recipe": "teacher.yaml"}
    write(folder / "short.yaml", "digits_pyramid_compare", student=student, data=data, compare=compare)
    words = ["compare", str(folder / "short.yaml"), "--max_steps", "3", "--warmup_epochs", "0.5"]
    assert main([*words, "--only", f"teacher,{','.join(PLANS)}", "--output_dir", str(folder / "out")]) == 0
    return folder / "out"


def write(path: Path, base: str, **sections: Any) -> None:
    path.write_text(yaml.safe_dump({"base": base, **sections}))


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in sorted(out.rglob("cell.json")))
    return {record["name"]: record for record in found}


def student_of(out: Path, name: str) -> Path:
    [found] = (out / "cells").glob(f"{name}-*/student")
    return found


def test_the_comparison_has_recovered_students_and_their_latency(compared: Path) -> None:
    found = records(compared)
    assert set(found) == {"teacher", *PLANS}
    assert all(record["error"] is None for record in found.values())
    kept, none = (found[name] for name in PLANS)
    assert [score["stage"] for score in none["scores"]] == ["zero-shot", "align", "task"]
    assert [score["stage"] for score in kept["scores"]] == ["zero-shot", "task"]  # nothing to align
    assert kept["scores"][0]["top1"] == found["teacher"]["scores"][0]["top1"]
    assert none["parameters"] < kept["parameters"]
    first, *_ = depths(graftvit.load(student_of(compared, "windows")))
    assert min(int(layer) for layer in none["layer_errors"]["align"]) == first
    cost = (compared / "compare.md").read_text().partition("| ms, batch 1 | unconverted ms |")[2]
    assert all(f"| {name} | {record['parameters']:,} |" in cost for name, record in found.items())
    assert all(record["speeds"][0]["latency"] > 0 for record in found.values())


def test_the_students_are_seen_by_stage(compared: Path, tmp_path: Path) -> None:
    student, teacher = student_of(compared, "first-none"), compared / "teacher" / "student"
    words = ["visualize", f"local-dir:{student}", "digits:3", "--teacher", f"local-dir:{teacher}"]
    assert main([*words, "--query", "7x9", "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    stages = depths(graftvit.load(student))
    without = [number < stages[0] for number in range(sum(stages))]
    assert [layer is None for layer in found["student"]["entropy"]] == without
    assert [js is None for js in found["js"]] == without
    assert (tmp_path / "digit_3_7x9_teacher.png").is_file()


def test_plain_timm_loads_what_the_plan_kept(compared: Path, photos: Path, plain_timm: PlainTimm) -> None:
    student = student_of(compared, "windows")
    code = f'model = timm.create_model("local-dir:{student}", pretrained=True)'
    found = plain_timm.measure(code, photos / "validation", "L")
    model = graftvit.load(student).eval()
    assert plan_of(model) is None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert found == pytest.approx(measure(model, transform, str(photos / "validation"), "L"), rel=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_recovery_on_photographs_submitted_on_this_machine(kind: str, photos: Path, tmp_path: Path) -> None:
    source, arguments = PUBLISHED[kind]
    sized = arguments if kind == "pvt" else {**arguments, "img_size": 64}  # timm's PVTv2 has no such argument
    teacher = write_stand_in(source, tmp_path / "teacher", sized, len(CLASSES))
    line = (
        f"submit recover_swin_tiny --teacher.source {teacher} --student.model {source.partition('.')[0]} "
        f"--student.img_size 64 --data_path {photos} --num_classes {len(CLASSES)} --batch_size 24 --workers 0 "
        f"--max_steps 3 --warmup_epochs 0.5 --device cpu --output_dir {tmp_path}/run "
        "--cluster local --nodes 1 --gpus_per_node 0"
    )
    assert main([*line.split(), "--student.model_args", json.dumps(arguments)]) == 0
    until(
        lambda: [each.outcome for each in JobFolder(tmp_path / "run").attempts()] == ["finished"], "the end"
    )
    out = tmp_path / "saved"
    assert main(["checkpoint", "save", f"local-dir:{tmp_path / 'run' / 'student'}", str(out)]) == 0
    model = graftvit.load(out).eval()
    assert plan_of(model) == plan_of(graftvit.load(tmp_path / "run" / "student"))
    reported = json.loads((out / "config.json").read_text())["graftvit"]["results"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = measure(model, transform, str(photos / "validation"))
    assert 100 * found["right"] / found["images"] == pytest.approx(reported["top1"])
    assert found["loss"] == pytest.approx(reported["loss"], rel=1e-4)
    assert load_config(tmp_path / "run" / "2-task").mode == "finetune"
