"""A method reads the settings that it declares, and a run refuses the others where they are set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from graftvit.transfer.loss_config import LossConfig
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names, reads_setting
from graftvit.transfer.methods.registry import find_method
from graftvit.transfer.setting import check_effect
from support.models.dense import gradient, images, tiny
from support.runs.engine_runs import config, make_teacher

OTHER: dict[str, Any] = {
    "layers": "0", "heads": [0], "loss": "kl", "feature_loss": "smooth_l1", "tokens": "both",
    "standardize": "phi_s", "standardize_images": 1, "logits_loss": "hard",
    "logits_head": "distillation", "weight": 0.5, "reduction": "mean", "temperature": 2.0, "rows": 0.5,
    "interpolate_grid": True,
}  # fmt: skip
"""For each setting of a loss, another value than its default."""
SETTINGS = [name for name in LossConfig.model_fields if name != "method"]
CASES = [(method, name) for method in method_names() for name in SETTINGS]


def test_each_setting_has_another_value() -> None:
    assert set(OTHER) == set(SETTINGS)
    assert all(
        OTHER[name] != field.default for name, field in LossConfig.model_fields.items() if name in OTHER
    )


def result(method: str, options: dict[str, Any]) -> torch.Tensor:
    """Everything that a step gives: logits, loss, and gradient of the student."""
    grid = {"img_size": (16, 48)} if options.get("interpolate_grid") else {}
    teacher, student = (
        tiny(seed=1, **grid),
        tiny("deit_distilled" if "logits_head" in options else "vit", seed=2),
    )
    torch.manual_seed(0)  # of sampled rows
    dual = DualViT(teacher, student, method, **options).double()
    dual.standardize([images()])
    out = dual(images())
    (out.logits.square().mean() + out.transfer_loss).backward()
    return torch.cat([out.logits.detach().flatten(), out.transfer_loss.detach()[None], gradient(student)])


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if reads_setting(*case)])
def test_what_a_method_reads_changes_its_result(method: str, name: str) -> None:
    changed = {name: OTHER[name]}
    plain = {"logits_head": "all"} if name == "logits_head" else {}
    if name == "standardize_images":
        plain = {"standardize": "dimension", "tokens": "patches"}
        changed |= plain
    if name == "interpolate_grid":
        with pytest.raises(Exception, match="interpolate_grid=true"):
            DualViT(tiny(seed=1, img_size=(16, 48)), tiny(seed=2), method)
        assert torch.isfinite(result(method, changed)).all()
        return
    assert not torch.equal(result(method, changed), result(method, plain))


def run_with(folder: Path, teacher: Path | None, settings: dict[str, Any], *, listed: bool) -> RunConfig:
    return config(folder, teacher, mode="transfer", transfer={"losses": [settings]} if listed else settings)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if not reads_setting(*case)])
def test_what_a_method_does_not_read_is_refused(method: str, name: str, listed: bool, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", tmp_path, {"method": method, name: OTHER[name]}, listed=listed)
    place = r"transfer.losses\[0\]" if listed else "transfer"
    with pytest.raises(
        ConfigError, match=rf"{place}.{name}=.* changes nothing with transfer.method={method}"
    ):
        check_effect(run)


@pytest.mark.parametrize("listed", [False, True])
def test_the_run_and_its_dry_run_refuse_it(listed: bool, tmp_path: Path) -> None:
    settings = {"method": "copy", "temperature": 2.0}
    run = run_with(tmp_path / "run", make_teacher(tmp_path / "teacher"), settings, listed=listed)
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(ConfigError, match=r"temperature=2.0 changes nothing with transfer.method=copy"):
            start()


def test_every_method_of_the_package_declares_what_it_reads() -> None:
    assert all(find_method(name).reads is not None for name in method_names())
