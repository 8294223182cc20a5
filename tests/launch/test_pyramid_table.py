"""What works with pyramids: the table of docs/conversion.md, command by command and family by family."""

from __future__ import annotations

import json
from pathlib import Path

import graftvit
import pytest
import torch
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import attention_shape, token_layout
from PIL import Image
from support.models.pyramids import TINY, tiny
from support.models.saved import save_pyramid
from support.runs.typed import Typed

TABLE = Path(__file__).parents[2] / "docs" / "conversion.md"
FAMILIES = {
    "PVT": "pvt1",
    "PVTv2": "pvt",
    "Twins": "svt",
    "Swin": "swin",
    "Swin V2": "swinv2",
    "CSwin": "cswin",
}
DATA = "--dataset digits --workers 0 --batch_size 8"
RUN = f"{DATA} --max_steps 1 --warmup_epochs 0 --output_dir {{out}} --dry_run"
CONTINUED = "train --mode finetune --student.model local-dir:{student}"
TAUGHT = "train --teacher {teacher} --student.model local-dir:{student}"
COMMANDS: dict[str, tuple[str, ...]] = {
    "`convert`, with `--calibrate` and `--weights`": (
        f"convert {{teacher}} --plan stage1:linear --without bias --calibrate 2 --weights mlp {DATA[:16]} --dry_run",
    ),
    "`checkpoint info`, `save`": (
        "checkpoint info {student}",
        "checkpoint save {student} {out} --img_size 64",
    ),
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
    "`hybrid`": (
        f"hybrid {{teacher}} --student own={{student}} --macs 0.999 --images 2 {DATA} --output_dir {{out}}",
    ),
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
        student = convert(teacher, "stage1: linear", without=["bias"])
        for name, model in (("teacher", teacher), ("student", student)):
            save_pyramid(root / name, kind, model, num_classes=10)
        Image.new("RGB", (32, 32)).save(root / "image.png")
        made = {"model": TINY[kind][0], "model_args": TINY[kind][1], "img_size": 32, "without": ["bias"]}
        recipe = {
            "teacher": {"source": str(root / "teacher")},
            "student": made,
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
    row: str, family: str, cell: str, folders: dict[str, dict[str, str]], tmp_path: Path, typed: Typed
) -> None:
    kind = FAMILIES[family]
    for number, command in enumerate(COMMANDS[row]):
        line = command.format(**folders[kind], out=tmp_path / f"out{number}")
        said = typed("", *line.split(), code=0 if cell == "yes" else 2).err
        if cell == "refused":
            assert any(name in said for name in ("layer 0", type(tiny(kind)).__name__, TINY[kind][0]))
            assert "Traceback" not in said


@pytest.mark.parametrize("kind", TINY)
def test_questions_with_one_answer_for_all_layers_are_refused(kind: str) -> None:
    for ask in (attention_shape, token_layout):
        with pytest.raises(UnsupportedModelError, match="has no single list of equal attention layers"):
            ask(tiny(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["svt", "swin"])
def test_a_converted_pyramid_is_trained_on_labels(
    kind: str, folders: dict[str, dict[str, str]], tmp_path: Path, typed: Typed
) -> None:
    student = folders[kind]["student"]
    data = "--dataset digits --epochs 1 --warmup_epochs 0 --batch_size 512"
    typed(f"train --mode finetune --student.model local-dir:{student} {data} --output_dir {tmp_path}")
    trained, before = graftvit.load(str(tmp_path / "student")), graftvit.load(student)
    assert plan_of(trained) == plan_of(before)
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)
