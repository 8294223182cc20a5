"""The sixteen known defects of the paper's published PyTorch code: a test each that shows it absent here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from graftvit.transfer.config import RunConfig

PACKAGES = ("models", "checkpoints", "transfer", "launch", "cfgs")


def sources() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        parent = importlib.import_module(f"graftvit.{package}")
        for module in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}."):
            if not module.name.endswith("__main__"):
                path = importlib.import_module(module.name).__file__
                yield module.name, Path(str(path)).read_text(encoding="utf-8")


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
