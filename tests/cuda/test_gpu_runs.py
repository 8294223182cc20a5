"""Whole runs on the GPUs of this machine: NCCL with DDP and FSDP2, every precision, and resuming."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.json_lines import read_records
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RUN = """
import sys
from pathlib import Path
from support.runs.engine_runs import config
from graftvit.transfer.engine.train import train
train(config(Path(sys.argv[1]), Path(sys.argv[2]), engine={"device": "cuda", "fsdp": sys.argv[3] == "fsdp"}))
"""


def losses(folder: Path) -> list[float]:
    return [record["train_loss"] for record in read_records(folder / "log.jsonl") if "train_loss" in record]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(precision: str, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    engine = {"device": "cuda", "precision": precision}
    for _ in range(2):  # the second resumes, and finds nothing to do
        train(config(tmp_path / "run", teacher, engine=engine))
    found = losses(tmp_path / "run")
    assert found
    assert all(math.isfinite(loss) for loss in found)


SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP needs several GPUs")


@pytest.mark.parametrize("wrap", ["ddp", pytest.param("fsdp", marks=SEVERAL)])
def test_every_gpu_of_this_machine(wrap: str, tmp_path: Path) -> None:
    teacher, program = make_teacher(tmp_path / "teacher"), tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path[:0] = {sys.path!r}\n{RUN}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", str(torch.cuda.device_count())]
    subprocess.run([*launcher, program, tmp_path / "run", teacher, wrap], check=True, timeout=300)
    assert losses(tmp_path / "run")
