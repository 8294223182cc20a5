"""What a recipe sets and a flag deprives of its effect has its default; what the user typed is refused by the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.load_config import load_config, load_stages
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.build import check_settings
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.stages import check_stages
from graftvit.transfer.setting import find_unread, value_of

RECIPE = "mode: transfer\nteacher: {source: 'local-dir:t', compile: true}\ndata: {dataset: digits}\n"


def loaded(folder: Path, text: str, *words: str) -> Any:
    (folder / "base.yaml").write_text(text)
    (folder / "mine.yaml").write_text("base: base.yaml\n")
    return load_config(folder / "mine.yaml", list(words))


INHERITED = [
    ("transfer: {method: distill, weight: 50.0, loss: kl}", ["method=copy"],
     {"transfer.weight": 3.0, "transfer.loss": "ce"}),
    ("transfer: {method: distill, layers: 'first:1'}", ["method=feature"], {"transfer.layers": "all"}),
    ("transfer: {method: feature, feature_loss: smooth_l1, task_weight: 0.5}", ["mode=finetune"],
     {"transfer.method": "distill", "transfer.task_weight": 1.0, "teacher.compile": False}),
    ("data: {dataset: digits, crop_scale: [0.4, 1.0], hflip: 0.2}", ["aa=affine"],
     {"data.crop_scale": (0.08, 1.0), "data.hflip": 0.5}),
    ("data: {dataset: digits, aa: none, color_jitter: 0.4}", ["aa=rand-m9"], {"data.color_jitter": 0.0}),
    ("data: {dataset: digits, train_samples: 40, label_seed: 3}", ["train_samples=none"], {"data.label_seed": 0}),
    ("optim: {blr: 1.0e-4}", ["lr=0.1"], {"optim.blr": 1e-3, "optim.lr": 0.1}),
    ("optim: {lr: 0.1}", ["blr=1e-4"], {"optim.blr": 1e-4, "optim.lr": None}),
    ("optim: {lr: 0.1}", ["blr=1e-3"], {"optim.blr": 1e-3, "optim.lr": None}),
    ("optim: {max_steps: 9}", ["epochs=100"], {"optim.epochs": 100, "optim.max_steps": None}),
    ("optim: {epochs: 7}", ["max_steps=9"], {"optim.epochs": 100, "optim.max_steps": 9}),
    ("optim: {epochs: 100, warmup_epochs: 20}", ["epochs=3"], {"optim.warmup_epochs": None}),
    ("optim: {epochs: 100, warmup_epochs: 20}", ["epochs=50"], {"optim.warmup_epochs": 20}),
    ("optim: {max_steps: 9}", ["epochs=7"], {"optim.epochs": 7, "optim.max_steps": None}),
    ("student: {drop_path: 0.1}\ntransfer: {share_drop_path: true}", ["drop_path=0"],
     {"transfer.share_drop_path": False}),
]  # fmt: skip
"""A recipe, flags over it, and what the run has."""


@pytest.mark.parametrize(("recipe", "words", "expected"), INHERITED)
def test_what_is_only_inherited_is_left_out(
    recipe: str, words: Sequence[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    head = "" if "data:" not in recipe else RECIPE.partition("data:")[0]
    config = loaded(tmp_path, (head or RECIPE) + recipe + "\n", *words)
    assert {key: value_of(config, key) for key in expected} == expected
    check_settings(mode_of(config))


TYPED = [
    ("transfer: {method: copy}", ["weight=5.0"], "transfer.weight=5.0 changes nothing with transfer.method=copy"),
    ("transfer: {method: distill}", ["method=copy", "weight=5.0"], "transfer.weight=5.0 changes nothing"),
    ("optim: {lr: 0.1}", ["lr=0.2", "blr=1e-4"], "optim.blr=0.0001 changes nothing beside optim.lr=0.2"),
    ("optim: {epochs: 3}", ["max_steps=9", "epochs=7"], "optim.epochs=7 changes nothing beside optim.max_steps=9"),
    ("optim: {epochs: 100}", ["epochs=3", "warmup_epochs=5"], "optim.warmup_epochs=5.0 is not below optim.epochs=3"),
    ("optim: {lr: 0.1, blr: 1.0e-4}", ["seed=3"], "optim.blr=0.0001 changes nothing beside optim.lr=0.1"),
    ("optim: {lr: 0.1, blr: 1.0e-4}", ["drop_path=0.1"], "optim.blr=0.0001 changes nothing beside optim.lr=0.1"),
]  # fmt: skip
"""A recipe, flags over it, and what the run refuses."""


@pytest.mark.parametrize(("recipe", "words", "sentence"), TYPED)
def test_what_changes_nothing_where_it_is_set_is_refused(
    recipe: str, words: Sequence[str], sentence: str, tmp_path: Path
) -> None:
    config = loaded(tmp_path, RECIPE + recipe + "\n", *words)
    with pytest.raises(ConfigError) as refused:
        check_settings(mode_of(config))
    assert str(refused.value).startswith(sentence)


def test_a_later_layer_gives_a_setting_its_effect(tmp_path: Path) -> None:
    recipe = "mode: transfer\nalign: {match: map}\nteacher: {dtype: bf16}\n"
    config = loaded(tmp_path, recipe, "mode=align", "teacher=local-dir:t", "plan=*: linear")
    assert (config.align.match, config.teacher.dtype) == ("map", "bf16")
    assert not find_unread(config)


STAGES = """
teacher: {source: 'local-dir:t'}
student: {plan: '*: linear', global_pool: token, drop_path: 0.1}
transfer: {method: block_output, reduction: mean}
align: {match: map}
data: {dataset: digits, smoothing: 0.2}
optim: {warmup_epochs: 0.5}
stages:
  - {name: one, mode: align, optim: {epochs: 2}}
  - {name: two, mode: transfer, optim: {epochs: 3}}
"""


def staged(folder: Path, *words: str) -> dict[str, Any]:
    (folder / "stages.yaml").write_text(STAGES)
    return {stage.name: stage.config for stage in load_stages(folder / "stages.yaml", list(words))}


def test_a_stage_leaves_out_what_is_for_others(tmp_path: Path) -> None:
    configs = staged(tmp_path, "weight=5.0")
    assert configs["one"].transfer.weight == 3.0
    assert configs["two"].transfer.weight == 5.0
    assert (configs["one"].align.match, configs["two"].align.match) == ("map", "output")
    assert (configs["one"].student.drop_path, configs["two"].student.drop_path) == (0.0, 0.1)
    assert not any(map(find_unread, configs.values()))


@pytest.mark.parametrize("word", ["one.weight=5.0", "temperature=2.0", "two.match=rows"])
def test_what_no_stage_reads_is_refused_before_the_first_one(word: str, tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(STAGES)
    stages = load_stages(tmp_path / "stages.yaml", [word, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"stage (one|two): .* changes nothing"):
        check_stages(stages)
    assert not (tmp_path / "run").exists()


def test_a_chained_stage_creates_no_student(tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(STAGES)
    first, second = check_stages(load_stages(tmp_path / "stages.yaml"))
    assert first.config.student.global_pool == "token"
    assert second.config.student.global_pool == "auto"
