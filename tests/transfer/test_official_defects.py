"""The sixteen known defects of the paper's published PyTorch code: a test each that shows it absent here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_teacher
from graftvit.checkpoints.state import read_state
from graftvit.checkpoints.student import write_student
from graftvit.models.parts import grid_positions
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import runlog as meters
from graftvit.transfer.engine.parallel import create_accelerator
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from torch import Tensor, nn

DEPTH, WIDTH = 6, 32
TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "num_classes": 5,
    "global_pool": "avg",
}
PACKAGES = ("models", "checkpoints", "transfer", "launch", "cfgs")


def vit(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def modules() -> Iterator[str]:
    for package in PACKAGES:
        parent = importlib.import_module(f"graftvit.{package}")
        yield parent.__name__
        for module in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}."):
            yield module.name


def sources() -> Iterator[tuple[str, str]]:
    for name in modules():
        if not name.endswith("__main__"):
            path = importlib.import_module(name).__file__
            if path is not None:
                yield name, Path(path).read_text(encoding="utf-8")


def calls_of(*watched: nn.Module) -> Counter[int]:
    """Counts forward calls of modules, by their place in the arguments."""
    counts: Counter[int] = Counter()
    for place, module in enumerate(watched):
        module.register_forward_hook(lambda *_, place=place: counts.update([place]))
    return counts


def test_01_every_module_imports() -> None:
    names = list(modules())
    assert {"graftvit.launch.cli", "graftvit.transfer.engine.train"} <= set(names)
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_02_the_choice_of_layers_reaches_the_model() -> None:
    dual = DualViT(vit(0), vit(1), "copy", layers=":-2")
    dual(images()).logits.sum().backward()
    for index, block in enumerate(dual.student.blocks):
        queries_and_keys = block.attn.qkv.weight.grad[: 2 * WIDTH]
        assert bool(queries_and_keys.any()) is (index >= DEPTH - 2), f"layer {index}"


def test_03_sine_cosine_table_builds_with_this_numpy() -> None:
    assert not hasattr(np, "float")
    table = grid_positions((2, 3), 8)
    assert table.shape[-2:] == (6, 8)
    assert torch.isfinite(table).all()


@pytest.mark.parametrize("method", ["distill", "distill_q", "copy"])
def test_04_the_student_runs_alone(method: str) -> None:
    student = vit(1, drop_path_rate=0.2)
    expected = student.eval()(images())
    dual = DualViT(vit(0), student, method)  # type: ignore[arg-type]
    dual.train()
    dual(images())
    assert torch.equal(dual.student.eval()(images()), expected)
    plain = vit(2)
    plain.load_state_dict(dual.release(bare=dual.needs_teacher).state_dict())
    assert torch.equal(plain.eval()(images()), expected)


def test_07_a_teacher_with_a_head_is_welcome(tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict()}, tmp_path / "finetuned.pth")
    teacher = load_teacher(str(tmp_path / "finetuned.pth"), model="vit_tiny_patch16_224", model_args=TINY)
    assert teacher.has_head
    assert torch.equal(teacher.model(images()), vit().eval()(images()))


def short_run(folder: Path) -> RunConfig:
    """A short distillation with a moving average, on digits, into `folder`, where its teacher is written too."""
    small = {**TINY, "img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 2}
    teacher = vit(0, **small)
    architecture = "vit_tiny_patch16_224"
    write_student(
        teacher,
        folder / "teacher",
        architecture=architecture,
        model_args=small,
        preprocessing=Preprocessing.of(teacher, mean=(0.5,), std=(0.5,)),
    )
    config = {
        "output_dir": folder / "run",
        "teacher": {"source": f"local-dir:{folder / 'teacher'}"},
        "student": {"model": architecture, "model_args": small, "img_size": 16},
        "data": {"dataset": "digits", "train_samples": 20, "batch_size": 10, "workers": 0, "aa": None},
        "optim": {"epochs": 1, "warmup_epochs": 0.5, "ema": 0.9},
        "engine": {"device": "cpu", "progress": False, "trackers": ()},
    }
    return RunConfig.model_validate(config)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defects")
    train(short_run(folder))
    return folder


def test_10_the_teacher_is_neither_saved_nor_averaged(finished_run: Path) -> None:
    teacher = load_teacher(f"local-dir:{finished_run / 'teacher'}").model
    size = sum(tensor.numel() for tensor in teacher.state_dict().values())
    tensors = read_state(finished_run / "run" / "checkpoints" / "last.safetensors").tensors
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes[name.split(".")[0]] += tensor.numel()
    assert sizes["student"] == sizes["ema"] == size
    assert set(sizes) <= {"student", "ema", "optimizer", "rng", "meters"}
    assert sizes["optimizer"] < 2.1 * size


def test_11_only_what_learns_is_counted(finished_run: Path) -> None:
    student = load_teacher(f"local-dir:{finished_run / 'run' / 'student'}").model
    records = [json.loads(line) for line in (finished_run / "run" / "log.jsonl").read_text().splitlines()]
    logged = [record["n_parameters"] for record in records if "n_parameters" in record]
    assert logged == [sum(p.numel() for p in student.parameters())]


def test_12_half_precision_is_used_where_it_is_asked_for() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = RunConfig.model_validate({"engine": {"precision": precision, "device": "cpu"}})
        accelerator = create_accelerator(config)
        dual = DualViT(vit(0), vit(1), "distill")
        with accelerator.autocast():
            output = dual(images())
        assert output.logits.dtype == dtype
        assert output.transfer_loss.dtype == torch.float32
        assert accelerator.scaler is None, "gradients are scaled for fp16 only"


def test_13b_a_loss_that_is_not_finite_stops_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = meters.LossHealth()
    watch.record(4, ("loss", "task"), torch.tensor([1.0, 1.0]))

    def other_rank(first: Tensor, op: object) -> None:
        first[0] = min(int(first[0]), 4)  # there, the total was not finite at step 4

    monkeypatch.setattr(meters.dist, "all_reduce", other_rank)
    assert watch.failures(SimpleNamespace(num_processes=2)) == {"loss": 4}  # type: ignore[arg-type]


def test_13c_no_process_leaves_on_its_own() -> None:
    for name, source in sources():
        # a benchmark has to wait for the device: that is what it measures
        if name.startswith("graftvit.transfer") and not name.startswith(
            "graftvit.transfer.analysis.benchmark"
        ):
            nodes = ast.walk(ast.parse(source))
            called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
            assert not called & {"sys.exit", "exit", "breakpoint", "torch.cuda.synchronize"}, name


def test_15_no_folder_or_partition_of_one_cluster_is_built_in() -> None:
    folders = ("/checkpoint", "/datasets", "/private", "/scratch", "/fsx")
    for name, source in sources():
        constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        for text in (value for value in constants if isinstance(value, str)):
            assert not text.startswith(folders), f"{name}: {text}"
            assert text not in ("learnfair", "devlab", "NCCL_SOCKET_IFNAME"), f"{name}: {text}"
    assert not RunConfig().output_dir.is_absolute()


def test_16_dependencies_are_declared_and_current() -> None:
    required = " ".join(importlib.metadata.requires("graftvit") or [])
    for package in ("timm>=", "torch>=", "torchvision>=", "accelerate>="):
        assert package in required
    for name, source in sources():
        assert "timm.models.layers" not in source, name
    environment = yaml.safe_load((Path(__file__).parents[2] / "environment.yml").read_text(encoding="utf-8"))
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert tuple(map(int, python.split("=")[1].split("."))) >= (3, 10)
