"""The table of docs/conversion.md: each command works on each family of pyramids, or refuses it in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.models.conversion import convert
from PIL import Image
from support.models.pyramids import TINY, arguments, tiny

TABLE = Path(__file__).parents[2] / "docs" / "conversion.md"
FAMILIES = {"PVT": "pvt1", "PVTv2": "pvt", "Twins": "svt", "Swin": "swin", "Swin V2": "swinv2"}
DATA = "--dataset digits --workers 0 --batch_size 8"
RUN = f"{DATA} --max_steps 1 --warmup_epochs 0 --output_dir {{out}} --dry_run"
CONTINUED = "train --mode finetune --student.model local-dir:{student}"
TAUGHT = "train --teacher {teacher} --student.model local-dir:{student}"
COMMANDS: dict[str, tuple[str, ...]] = {
    "`convert`, with `--calibrate` and `--weights`": (
        f"convert {{teacher}} --plan stage1:linear --without bias --calibrate 2 --weights mlp {DATA[:16]} --dry_run",
    ),
    "`teacher info`, `save`": ("teacher info {student}", "save {student} {out} --img_size 64"),
    "`evaluate`": (f"evaluate {{student}} {DATA} --train_samples 20",),
    "`export`, at one image size": ("export {student} {out}.pt2",),
    "`benchmark models`": (
        "benchmark models {teacher} --plan stage1:softmax --img_size 32 --batch 1 --repeats 1 --output_dir {out}",
    ),
    "`visualize`": ("visualize {student} {image} --output_dir {out}",),
    "`train --mode finetune`, `--mode scratch`": (
        f"{CONTINUED} {RUN}",
        f"train --mode scratch {{architecture}} --student.plan stage1:linear --without bias {RUN}",
    ),
    "`student.grad_checkpointing`": (f"{CONTINUED} --grad_checkpointing {RUN}",),
    "`optim.layer_decay`": (f"{CONTINUED} --layer_decay 0.7 {RUN}",),
    "`optim.lora`": (f"{CONTINUED} --lora 2 {RUN}",),
    "`train --mode align`": (f"{TAUGHT} --mode align {RUN}",),
    "`layers`": (f"layers {{student}} --teacher {{teacher}} --keep 1 --batches 1 {DATA}",),
    "`train --mode transfer`, of each method but the copies ([docs/transfer.md](transfer.md#pyramids))": (
        *(f"{TAUGHT} --method {method} {RUN}" for method in ("attention_output", "feature", "logits")),
    ),
    "`train` with a copying method, which works in Python alone": (f"{TAUGHT} --method copy {RUN}",),
    "`compare`": ("compare {recipe} --output_dir {out} --dry_run",),
    "`train --mode pretrain`": (f"train --mode pretrain {{architecture}} {RUN}",),
    "`student.mirror_teacher`": (f"train --teacher {{teacher}} --mirror_teacher {{architecture}} {RUN}",),
}
"""The commands of each row; in braces what a family has of its own."""


def rows() -> dict[str, list[str]]:
    """Return the cells of the table by the words of their row."""
    lines = (
        TABLE.read_text(encoding="utf-8").split("What works with a pyramid")[1].split("\n\n")[1].splitlines()
    )
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [cell.strip("|").strip() for cell in cells[0]] == ["command", *FAMILIES]
    return {row[0].strip(): [cell.strip("| ") for cell in row[1:]] for row in cells[2:]}


def cases() -> list[object]:
    """Return each cell of the table; a refusal is quick."""
    return [
        pytest.param(row, family, cell, marks=[] if cell == "refused" else pytest.mark.slow)
        for row, cells in rows().items()
        for family, cell in zip(FAMILIES, cells, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return the words that a command line needs, for each kind."""
    found = {}
    for kind in FAMILIES.values():
        root, teacher = tmp_path_factory.mktemp(kind), tiny(kind, num_classes=10)
        how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
        shown = Preprocessing.of(teacher, input_size=(3, 32, 32))
        student = convert(teacher, "stage1: linear", without=["bias"])
        for name, model in (("teacher", teacher), ("student", student)):
            write_student(model, root / name, **how, preprocessing=shown)
        Image.new("RGB", (32, 32)).save(root / "image.png")
        recipe = {
            "teacher": {"source": str(root / "teacher")},
            "student": {
                "model": TINY[kind][0],
                "model_args": TINY[kind][1],
                "img_size": 32,
                "without": ["bias"],
            },
            "compare": {"plans": {"softmax": "stage1: softmax"}},
            "data": {"dataset": "digits"},
            "stages": [{"name": "task", "mode": "finetune"}],
        }
        (root / "recipe.yaml").write_text(json.dumps(recipe))
        sizes = " ".join(f"--student.model_args.{key} {json.dumps(value, separators=(',', ':'))}"
                         for key, value in TINY[kind][1].items())  # fmt: skip
        found[kind] = {
            "teacher": str(root / "teacher"), "student": str(root / "student"), "image": str(root / "image.png"),
            "recipe": str(root / "recipe.yaml"),
            "architecture": f"--student.model {TINY[kind][0]} --student.img_size 32 {sizes}",
        }  # fmt: skip
    return found


def test_every_row_has_its_commands() -> None:
    assert list(rows()) == list(COMMANDS)
    assert {cell for cells in rows().values() for cell in cells} == {"yes", "refused"}


@pytest.mark.parametrize(("row", "family", "cell"), cases())
def test_a_command_works_or_refuses_by_name(
    row: str,
    family: str,
    cell: str,
    folders: dict[str, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = folders[FAMILIES[family]]
    for number, command in enumerate(COMMANDS[row]):
        code = main(command.format(**words, out=tmp_path / f"out{number}").split())
        said = capsys.readouterr().err
        assert code == (0 if cell == "yes" else 2), said
        if cell == "refused":
            name = type(tiny(FAMILIES[family])).__name__
            assert "layer 0" in said or name in said or TINY[FAMILIES[family]][0] in said
            assert "Traceback" not in said
