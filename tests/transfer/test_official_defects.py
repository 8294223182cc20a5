"""Known defects of the paper's published PyTorch code that only a look at the whole source shows absent here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import meters
from torch import Tensor

PACKAGES = ("models", "checkpoints", "transfer", "launch", "cfgs")


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


def test_every_module_imports() -> None:
    names = list(modules())
    assert {"graftvit.launch.cli", "graftvit.transfer.engine.train"} <= set(names)
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_a_loss_that_is_not_finite_stops_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = meters.LossHealth()
    watch.record(4, ("loss", "task"), torch.tensor([1.0, 1.0]))

    def other_rank(first: Tensor, op: object) -> None:
        first[0] = min(int(first[0]), 4)  # there, the total was not finite at step 4

    monkeypatch.setattr(meters.dist, "all_reduce", other_rank)
    assert watch.failures(SimpleNamespace(num_processes=2)) == {"loss": 4}  # type: ignore[arg-type]


def test_no_process_leaves_on_its_own() -> None:
    for name, source in sources():
        # a benchmark has to wait for the device: that is what it measures
        if name.startswith("graftvit.transfer") and not name.startswith(
            "graftvit.transfer.analysis.benchmark"
        ):
            nodes = ast.walk(ast.parse(source))
            called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
            assert not called & {"sys.exit", "exit", "breakpoint", "torch.cuda.synchronize"}, name


def test_no_folder_or_partition_of_one_cluster_is_built_in() -> None:
    folders = ("/checkpoint", "/datasets", "/private", "/scratch", "/fsx")
    for name, source in sources():
        constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        for text in (value for value in constants if isinstance(value, str)):
            assert not text.startswith(folders), f"{name}: {text}"
            assert text not in ("learnfair", "devlab", "NCCL_SOCKET_IFNAME"), f"{name}: {text}"
    assert not RunConfig().output_dir.is_absolute()


def test_dependencies_are_declared_and_current() -> None:
    required = " ".join(importlib.metadata.requires("graftvit") or [])
    for package in ("timm>=", "torch>=", "torchvision>=", "accelerate>="):
        assert package in required
    for name, source in sources():
        assert "timm.models.layers" not in source, name
    environment = yaml.safe_load((Path(__file__).parents[2] / "environment.yml").read_text(encoding="utf-8"))
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert tuple(map(int, python.split("=")[1].split("."))) >= (3, 10)
