"""Packages of others: found by their entry points when a name is not one of ours, or imported by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from graftvit.launch.load_config import load_config
from graftvit.models import plugins
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError
from graftvit.models.families.walk import FAMILIES, find_family
from graftvit.models.layer_plan import OPERATORS
from graftvit.transfer.methods import method_facts, registry
from support.models.dense import tiny
from support.runs.typed import Typed
from torch import nn

MODULE = """
from graftvit.models import register_operator
from graftvit.models.layer_plan import OPERATORS
from graftvit.transfer import Installed, TransferMethod, Wanted, register_method


class Halves(TransferMethod):
    name = "halves"
    words = "halves"
    uses_layers = False
    reads = frozenset({"weight"})

    def wanted(self, plan):
        return Wanted(whole=frozenset({"classes"}))

    def install(self, pairing):
        return Installed()


register_operator("plugged", OPERATORS["uniform"])
register_method(Halves())
"""


def forget() -> None:
    plugins._entries.cache_clear()
    plugins._import.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path` with the module `plugged_in`; what it registers goes with it."""
    (tmp_path / "plugged_in.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()
    sys.modules.pop("plugged_in", None)
    OPERATORS.pop("plugged", None)
    method_facts.METHODS.pop("halves", None)
    registry._registered.pop("halves", None)


def installed(folder: Path, module: str = "plugged_in") -> None:
    """Give the folder what an installer writes for a distribution with an entry point."""
    about = folder / "plugged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[graftvit.plugins]\nown = {module}\n")


def test_an_entry_point_is_imported_when_a_name_is_not_ours(package: Path) -> None:
    installed(package)
    load_config(None, {"transfer.method": "feature"})
    convert(tiny(), "*: linear")
    assert "plugged_in" not in sys.modules
    assert load_config(None, {"transfer.method": "halves"}).transfer.method == "halves"
    convert(tiny(), "*: plugged")


@pytest.mark.parametrize("look", ["operator", "family", "list"])
def test_each_registry_looks_among_the_plugins(look: str, package: Path, typed: Typed) -> None:
    installed(package)
    before = len(FAMILIES)
    if look == "operator":
        convert(tiny(), "*: plugged")
    elif look == "family":
        assert find_family(nn.Linear(2, 2)) is None
    else:
        assert "plugged" in typed("list", "operators", "plugged").out
    assert "plugged_in" in sys.modules
    assert len(FAMILIES) == before


def test_a_plugin_that_fails_is_named(package: Path) -> None:
    installed(package, "not_there_at_all")
    with pytest.raises(ConfigError, match="the plugin own of plugged: 'not_there_at_all' cannot be imported"):
        convert(tiny(), "*: plugged")


def test_a_package_is_imported_by_name_and_recorded(package: Path, typed: Typed) -> None:
    with pytest.raises(ConfigError, match="halves"):
        load_config(None, {"transfer.method": "halves"})
    run = load_config(None, ["method=halves", "import=plugged_in"])
    assert (run.imports, run.transfer.method) == (["plugged_in"], "halves")
    with pytest.raises(ConfigError, match="imports: 'not_there' cannot be imported"):
        load_config(None, ["import=not_there"])
    words = "--teacher vit_tiny_patch16_224 --dataset digits --method halves"
    assert "not_there" in typed(f"train {words} --import not_there --dry_run", code=2).err
