"""One place opens files for reading, `checkpoints/files.py`: it waits for no pipe and reads no endless file."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_structure import ROOT, python_files

READERS = {
    "open", "read_text", "read_bytes", "load_file", "safe_open", "ZipFile", "FileIO", "mmap", "memmap", "fromfile",
    "loadtxt", "genfromtxt", "read_table", "ParquetFile", "InferenceSession",
}  # fmt: skip
LOADERS = {("np", "load"), ("torch", "load"), ("onnx", "load"), ("pickle", "load"), ("Image", "open")}
"""Readers whose plain name says too little."""
STREAM = "reads a stream that is open"
CHECKED = "reads a file that was checked before, by `outline`, `check_state` or `stat`"
ALONE = "runs in a student's own file, beside what it reads"
OWN = "reads a file of an installed package"
SYSTEM = "reads a file of the system"
ALLOWED = {
    "checkpoints/files.py open": "is the place",
    "checkpoints/atomic.py open": "waits for what was written, and reads nothing",
    "checkpoints/export_graph.py InferenceSession": "runs the graph that was just written",
    "checkpoints/card.py read_text": OWN,
    "checkpoints/targets.py load": "reads the graph that was just written",
    "checkpoints/targets.py read_text": OWN,
    "checkpoints/modeling_graftvit.py load_file": ALONE,
    "checkpoints/modeling_graftvit.py read_text": ALONE,
    "checkpoints/safety.py FileIO": STREAM,
    "checkpoints/safety.py ZipFile": STREAM,
    "checkpoints/safety.py open": STREAM,
    "checkpoints/safety.py mmap": STREAM,
    "checkpoints/weight_files.py load": CHECKED,
    "checkpoints/weight_files.py safe_open": CHECKED,
    "launch/cli.py open": SYSTEM,
    "launch/load_config.py read_text": OWN,
    "launch/slurm/batch.py read_bytes": OWN,
    "launch/slurm/batch.py read_text": OWN,
    "transfer/analysis/demo_cells.py read_text": OWN,
    "transfer/analysis/report/rendering.py read_text": OWN,
    "transfer/bench_rows.py ParquetFile": STREAM,
    "transfer/kits.py read_text": OWN,
    "transfer/bench_run.py read_text": SYSTEM,
    "transfer/cells.py read_text": SYSTEM,
    "transfer/data/archives.py ZipFile": STREAM,
    "transfer/data/archives.py open": STREAM,
    "transfer/data/dense.py load": "reads what another process of the run sent",
    "transfer/data/digits.py load": OWN,
    "transfer/data/shard_index.py load": STREAM,
    "transfer/data/shard_index.py open": STREAM,
    "transfer/data/shard_places.py open": STREAM,
    "transfer/data/shards.py load": STREAM,
    "transfer/data/shards.py open": STREAM,
    "transfer/data/streams.py open": STREAM,
    "transfer/data/image_folder.py open": STREAM,
    "transfer/data/labels.py read_text": OWN,
    "transfer/engine/cached_targets.py open": "is a method of the cache",
    "transfer/engine/fence.py read_text": SYSTEM,
    "transfer/staging.py open": CHECKED,
}


def reads(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name and line of each call that may open a file to read it; writing is none."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, owner = called(node.func)
        if (name in READERS or (owner, name) in LOADERS) and not _writes(node, owner):
            yield name, node.lineno


def called(function: ast.expr) -> tuple[str, str]:
    """Return the name of what is called, and of what it belongs to."""
    if isinstance(function, ast.Attribute):
        return function.attr, function.value.id if isinstance(function.value, ast.Name) else "?"
    return (function.id, "") if isinstance(function, ast.Name) else ("", "")


def _writes(call: ast.Call, owner: str) -> bool:
    """Return whether the call names a mode that writes."""
    place = 0 if owner else 1
    modes = [*call.args[place : place + 1], *(each.value for each in call.keywords if each.arg == "mode")]
    found = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) < 4 for mode in found)


def test_files_are_read_in_one_place() -> None:
    found = {
        f"{path} {name}": line
        for path in python_files(ROOT)
        for name, line in reads((ROOT / path).read_text())
    }
    others = [f"{place} (line {line})" for place, line in found.items() if place not in ALLOWED]
    assert others == [], "read them with checkpoints/files.py: read_regular, read_json, open_regular"
    assert sorted(ALLOWED.keys() - found) == [], "allowed, and no longer there"


@pytest.mark.parametrize(
    "call",
    ["open(p)", "p.open()", "p.open('rb')", "io.open(p, 'r')", "os.open(p, os.O_RDONLY)", "p.read_text()",
     "p.read_bytes()", "load_file(p)", "safetensors.torch.load_file(p)", "safe_open(p, framework='pt')", "np.load(p)",
     "torch.load(p)", "Image.open(p)", "zipfile.ZipFile(p)", "tarfile.open(p)", "parquet.read_table(p)"],
)  # fmt: skip
def test_the_check_notices(call: str) -> None:
    assert len(list(reads(f"x = {call}"))) == 1


@pytest.mark.parametrize(
    "call", ["p.open('w')", "p.open('ab', buffering=0)", "open(p, mode='x')", "json.load(f)"]
)
def test_the_check_leaves_writers_alone(call: str) -> None:
    assert list(reads(call)) == []
