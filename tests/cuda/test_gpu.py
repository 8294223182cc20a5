"""Operators, steps and whole runs on a real GPU: every precision against float64, compiled, without a wait, resumed."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.files import read_records
from graftvit.models.attention.base import Geometry, Heads
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names
from support.models.dense import gradient, images, relative_error, tiny
from support.models.operator_cases import CASES, Case, draw
from support.runs.engine_runs import config, make_teacher
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WIDTHS = [16, 20, 64, 80, 264]
"""Flash and memory-efficient kernels, widths that they are padded to, and one that neither takes."""


def close(value: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool((value.cpu().double() - reference).norm() <= tolerance * reference.norm().clamp_min(1e-12))


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = 0.3 * q @ k.transpose(-2, -1) + (0 if bias is None else bias)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("operator", ["attention_with_lse", "apply_map", "map_logsumexp"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("images", [0, 1, 2], ids=["no bias", "shared bias", "bias by image"])
def test_fused(operator: str, dtype: torch.dtype, width: int, images: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, tokens, width).to(dtype) for tokens in (45, 37, 37)]
    given[0][1] = 0
    bias = torch.randn(images, 3, 45, 37).to(dtype) if images else None
    inputs = [x.to(DEVICE).requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    moved, wide = (None, None) if bias is None else (bias.to(DEVICE), bias.double())
    upstream, upstream_lse = torch.randn(2, 3, 45, width).to(dtype), torch.randn(2, 3, 45)
    upstream[0, :, 1:] = 0  # rows that nothing reads
    out_exact, lse_exact = dense(*exact, wide)
    (q, k, v), (q64, k64, v64) = inputs, exact
    if operator == "attention_with_lse":
        found, wanted, taught = attention_with_lse(q, k, v, 0.3, moved), (out_exact, lse_exact), inputs
    elif operator == "apply_map":
        found, wanted, taught = (apply_map(q, k, v, 0.3, moved),), (out_exact,), [v]
    else:
        found, wanted, taught = (map_logsumexp(q, k, 0.3, moved),), (lse_exact,), [q, k]
    targets = {id(q): q64, id(k): k64, id(v): v64}
    gradients = [upstream if x.dim() == 4 else upstream_lse for x in found]
    grads = torch.autograd.grad(found, taught, [g.to(x) for g, x in zip(gradients, found, strict=True)])
    grads_exact = torch.autograd.grad(
        wanted, [targets[id(x)] for x in taught], [g.double() for g in gradients]
    )
    tolerance = TOLERANCE[dtype]
    assert all(close(x, y, tolerance) for x, y in zip(found, wanted, strict=True))
    assert all(close(x, y, 2 * tolerance) for x, y in zip(grads, grads_exact, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case: Case) -> None:
    geometry = Geometry(1, (7, 9))
    exact, heads = case.build(geometry, torch.float64), draw(geometry, torch.float64)
    operator = case.build(geometry, torch.float32).to(DEVICE)
    moved = Heads(*(x.to(DEVICE, torch.float32) for x in heads.qkv()), None, heads.scale, geometry=geometry)
    assert close(operator(moved), exact(heads), 1e-3 * case.tolerance)


# Steps on a real GPU: every method in every precision against float64, compiled, and without a wait.


PRECISIONS: dict[str, tuple[torch.dtype | None, float]] = {
    "fp32": (None, 1e-3), "tf32": (None, 2e-2), "bf16": (torch.bfloat16, 8e-2), "fp16": (torch.float16, 2e-2),
}  # fmt: skip
"""The type of autocast, and how far gradients may be from those of float64."""
METHODS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
METHODS += [("distill", {"heads": [1]}), ("copy", {"heads": [1]}), ("distill", {"temperature": 2.0})]


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Round the inputs of float32 products in tests of TF32 alone."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = "tf32" in request.node.name
    yield
    for kind, value in zip(kinds, before, strict=True):
        kind.allow_tf32 = value


def loss_of(dual: DualViT, x: Tensor) -> Tensor:
    out = dual(x)
    return out.logits.float().square().mean() + out.transfer_loss


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["vit", "beit", "eva02"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_gradients(method: str, options: dict[str, Any], family: str, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    exact = DualViT(tiny(family, 0), tiny(family, 1), method, **options)
    loss = exact(images())
    (loss.logits.square().mean() + loss.transfer_loss).backward()
    teacher, student = (tiny(family, seed, torch.float32).to(DEVICE) for seed in (0, 1))
    dual = DualViT(teacher, student, method, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=precision == "fp16")
    with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
        scaled = scaler.scale(loss_of(dual, images(dtype=torch.float32).to(DEVICE)))
    scaled.backward()
    found = gradient(student).cpu() / (scaler.get_scale() if scaler.is_enabled() else 1)
    assert relative_error(found, gradient(exact.student)) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_no_step_waits_for_the_gpu(method: str, options: dict[str, Any], precision: str) -> None:
    dtype, _ = PRECISIONS[precision]
    teacher, student = (tiny("vit", seed, torch.float32).to(DEVICE) for seed in (0, 1))
    dual = DualViT(teacher, student, method, **options).train()
    x = images(dtype=torch.float32).to(DEVICE)

    def step() -> None:
        with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
            loss = loss_of(dual, x)
        loss.backward()

    step()  # torch and its libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize("method", ["copy", "distill"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled(method: str, family: str, dtype: torch.dtype | None) -> None:
    x, losses = images(dtype=torch.float32).to(DEVICE), []
    teacher, student = (tiny(family, seed, torch.float32).to(DEVICE) for seed in (0, 1))
    gradients = []
    for compiles in (False, True):
        dual = DualViT(copy.deepcopy(teacher), copy.deepcopy(student), method)
        if compiles:
            dual.compile()
        with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
            losses.append(loss_of(dual, x))
        losses[-1].backward()
        gradients.append(gradient(dual.student))
    assert relative_error(gradients[1], gradients[0]) < (1e-3 if dtype is None else 8e-2)


# Whole runs on the GPUs of this machine: NCCL with DDP and FSDP2, every precision, and resuming.


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
