"""A mistake in the words of a command is one sentence, which names it and what to write; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from golden_sentences import GOLDEN
from graftvit.models.conversion import convert
from support.models.saved import save_model
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher
from support.runs.typed import Typed

BENCH = "programs bench run attnbench_digits --output_dir x"
LINEAR = "convert teacher --plan '*: linear' --output_dir x"
MISTAKES = [
    ("benchmark operator", "did you mean 'operators'"),
    ("benchmark operators --output_dir x --operators liner", "did you mean 'linear'"),
    ("benchmark operators --output_dir x --batch 0", "--batch"),
    ("benchmark operators --output_dir x --tokens x", "--tokens"),
    ("benchmark operators --output_dir x --dtype float8", "float8"),
    ("benchmark models --output_dir x --plan '*: linear'", "SOURCE"),
    ("benchmark models --output_dir x vit_tiny_patch16_224", "--plan"),
    ("benchmark energy", "SOURCE"),
    ("benchmark energy pvt_v2_b0 --plan 'stage1: hsh'", "did you mean 'hash'"),
    ("benchmark energy pvt_v2_b0 --img_size 0", "--img_size"),
    ("benchmark energy pvt_v2_b0 --accounting tru", "published"),
    ("benchmark energy crossvit_9_240", "whose operations are not known"),
    ("convert teacher --output_dir x", "the following arguments are required: --plan"),
    ("convert teacher --plan '*: linaer' --output_dir x", "unknown operator 'linaer'; did you mean 'linear'"),
    (
        "convert teacher --plan '*: linear(feature=[1])' --output_dir x",
        "a value is a finite number, a name, true or",
    ),
    (f"{LINEAR} --weights some", "invalid choice: 'some'"),
    (f"{LINEAR} --calibrate -1", "--calibrate"),
    (f"{LINEAR} --calibrate 4 --data_path away", "away does not exist"),
    (f"{LINEAR} --blr 1", "--blr"),
    (
        "convert teacher --plan '1: hash' --output_dir x",
        "has hash, which must be fitted to images: give --calibrate N",
    ),
    (
        "convert pvt_v2_b0 --plan 'stage3: linear; 4-5: keep' --dry_run",
        "name an operator or merge: deformable",
    ),
    ("export teacher model.onnx --dynamic none batch", "--dynamic none cannot be combined"),
    ("export teacher model.onnx --dynamic time", "invalid choice: 'time'"),
    ("export teacher model.pt2 --opset 18", "opset"),
    ("deploy teacher --to tflite --output_dir x --dataset digits", "--to"),
    ("deploy teacher --to onnx --drop -1 --output_dir x --dataset digits", "--drop"),
    ("deploy teacher --to onnx --dataset digits", "--output_dir"),
    ("checkpoint save teacher x --dtype int8", "--dtype"),
    ("checkpoint save teacher x --max_shard_size 0GB", "write a number with KB, MB, GB or TB"),
    ("checkpoint save teacher x --max_shard_size GB", "write a number with KB, MB, GB or TB"),
    ("checkpoint save teacher x --blr 1", "--blr has no effect on this command"),
    ("convert teacher --plan '*: linear' --num_workers 0", "`graftvit convert --help` lists the valid flags"),
    ("checkpoint inspect none.pth", "none.pth cannot be read: No such file"),
    ("hybrid teacher --macs 1.9 --dataset digits --output_dir x", "--macs"),
    ("hybrid teacher --keep x --dataset digits --output_dir x", "--keep"),
    (
        "hybrid teacher --student own=teacher --keep 1 --dataset digits --output_dir x",
        "own converts no layer",
    ),
    ("train --mode scratch --dataset digits --model vit_tiny_patch16_224.nope --dry_run", "no tag 'nope'"),
    ("train --mode scratch --dataset digits --batch_size 9223372036854775807 --dry_run", "--batch_size is"),
    (
        "train --mode align --teacher teacher --plan '*: linear' --teacher.dtype bf16 --dataset digits --dry_run",
        "teacher.dtype=bf16 does not go with mode=align",
    ),
    ("push 'a#b' me/x --dry_run", "'a#b'"),
    ("data /nowhere", "/nowhere does not exist"),
    ("data data/flowers", "data/flowers does not exist"),
    ("data torch/cifar11 --data_path .", "torch/cifar11"),
    ("data digits --images 0", "--images: give a whole number, 1 or more"),
    ("data digits --limit 0", "--limit: give a whole number, 1 or more"),
    ("list operators linaer", "unknown operator 'linaer'; did you mean 'linear'"),
    ("programs check attnzero_106", "unknown program 'attnzero_106'; did you mean 'attnzero_105'"),
    ("programs check 'MM(q k)'", "'M' is not a name or a parenthesis; names are in lower case"),
    ("programs draw --count 0", "--count: give a whole number from 1 to 100,000, not '0'"),
    ("programs attnzero_105", "unknown action 'attnzero_105'"),
    (
        "programs search teacher --output_dir x",
        "a search needs images: give --data_path FOLDER, or --dataset digits",
    ),
    ("programs search teacher --output_dir x --dataset digits --population 0", "--population"),
    ("programs search teacher --dataset digits", "--output_dir"),
    ("programs search teacher --output_dir x --dataset digits --workers 0", "--workers"),
    ("programs bench rum", "unknown action 'rum'; did you mean 'run'?"),
    ("programs bench run digits_scratch --output_dir x", "digits_scratch has no section 'attnbench'"),
    (f"{BENCH} --program 'mul(q'", "the parenthesis of mul is not closed"),
    (f"{BENCH} --drawn -1", "--drawn: give a whole number from 0"),
    (f"{BENCH} --threads 0", "--threads: give a whole number, 1 or more"),
    (f"{BENCH} --seeds -2", "--seeds: give a whole number from 0 to 9,223,372,036,854,775,807"),
    ("programs bench run attnbench_digits", "--output_dir"),
    ("programs bench merge none.jsonl --out x.jsonl", "none.jsonl cannot be read"),
    ("reproduce attention-coppy", "no kit 'attention-coppy'; did you mean 'attention-copy'"),
    ("reproduce lit --surrogate", "--surrogate and --output_dir"),
    ("reproduce lit --output_dir x", "--surrogate and --output_dir"),
    ("reproduce --surrogate --output_dir x", "name a kit"),
    ("reproduce lit --out x.jsonl", "--out x.jsonl needs --row"),
    ("reproduce lit --data_path x", "--data_path x needs --row"),
    ("reproduce lit --surrogate --output_dir x --row y", "--surrogate and --row"),
    ("reproduce lit --row teacher --dataset digits", "has not recorded its settings"),
    ("reproduce lit --row teacher --row teacher --dataset digits", "has the recipe lit_small"),
    ("reproduce lit --row teacher --verify none.jsonl", "none.jsonl cannot be read"),
    ("reproduce --kits none.yaml", "none.yaml cannot be read"),
    ("programs bench query rows.jsonl --top -1", "--top: give a whole number, 0 or more"),
    ("programs bench verify rows.jsonl --sample 0", "--sample: give a whole number, 1 or more"),
]
"""A line, and the words of its error that tell what is wrong."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a student that was converted from it."""
    folder = tmp_path_factory.mktemp("place")
    make_teacher(folder / "teacher")
    student = convert(timm.create_model(f"local-dir:{folder / 'teacher'}", pretrained=True), "*: linear")
    arguments = {**ARGUMENTS, "num_classes": 10}
    save_model(folder / "student", student, ARCHITECTURE, arguments, mean=(0.5,), std=(0.5,))
    return folder


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_a_mistake_is_one_sentence(
    line: str, said: str, place: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    told = typed(line, code=2).err
    assert said in told
    assert told.startswith("graftvit: error: ")
    assert told.count("\n") == 1
    assert {path.name for path in place.iterdir()} == {"teacher", "student"}


@pytest.mark.parametrize("line", GOLDEN)
def test_a_golden_sentence_is_whole(
    line: str, place: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path))
    monkeypatch.chdir(place)
    assert typed(line, code=2).err == f"graftvit: error: {GOLDEN[line]}\n"
    assert {path.name for path in place.iterdir()} == {"teacher", "student"}
