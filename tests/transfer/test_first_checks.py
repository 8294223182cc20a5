"""Cheap mistakes are refused before torch is imported, in the words of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.first_checks import check_first

CODE = """
import json, sys
from graftvit.launch.cli import main
codes = [main(["train", *words]) for words in json.loads(sys.argv[1])]
heavy = {"torch", "timm", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else f"codes {set(codes)}")
"""
MISTAKES = {
    "mode=transfer needs a teacher": ["--dataset", "digits"],
    "mode=finetune needs weights to start from": ["--mode", "finetune", "--dataset", "digits"],
    "--align.match": ["digits_scratch", "--align.match", "nosuch"],
    "align.match='map' changes nothing with mode=scratch": ["digits_scratch", "--match", "map"],
    "transfer.layers='firts:2' is not a choice": ["digits_distill", "--layers", "firts:2"],
    "plan entry '*' has no colon": ["digits_scratch", "--plan", "*"],
    "optim.warmup_epochs=9": ["digits_scratch", "--warmup_epochs", "9", "--epochs", "9"],
    "there is no folder 'nowhere'": ["digits_distill", "--teacher", "local-dir:nowhere"],
    "the weights file 'no.pth' is not there": ["digits_scratch", "--init", "no.pth"],
    "stage features: transfer.layers='firts:2' is not a choice": [
        "lit_from_swin_tiny",
        "--features.layers",
        "firts:2",
    ],
    "checkpoint_path names weights": ["digits_scratch", "student.model_args.checkpoint_path=a"],
    "num_classes changes nothing here: leave it out, or set data.num_classes": [
        "digits_scratch", "student.model_args.num_classes=5",
    ],
    "global_pool changes nothing here: leave it out, or set student.global_pool": [
        "digits_scratch", "student.model_args.global_pool=avg",
    ],
    "student.mirror_teacher=true changes nothing with a student that is its teacher's model": [
        "--mode", "finetune", "--teacher", "vit_tiny_patch16_224", "--mirror_teacher", "--dataset", "digits",
    ],
    "data.data_path=nowhere does not exist": ["--mode", "scratch", "--data_path", "nowhere"],
    "data.data_path is not set": ["--mode", "scratch"],
}  # fmt: skip
"""By the beginning of its sentence, the words after `graftvit train`."""


def train_without_torch(*runs: list[str]) -> tuple[str, str]:
    """Return the output and the errors of several commands, one line each, and the set of their codes."""
    command = [sys.executable, "-c", CODE, json.dumps(runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "imported" not in result.stderr
    return result.stdout, result.stderr


def test_a_configuration_is_resolved_without_torch() -> None:
    shown, errors = train_without_torch(["digits_distill", "--layers", "first:2", "--print_config"])
    assert errors == "codes {0}\n"
    assert "layers: first:2\n" in shown
    shown, errors = train_without_torch(["lit_from_swin_tiny", "--print_config"])
    assert errors == "codes {0}\n"
    assert shown.count("# stage ") > 1


def test_mistakes_are_refused_without_torch() -> None:
    _, errors = train_without_torch(*MISTAKES.values())
    *sentences, codes = errors.splitlines()
    assert codes == "codes {2}"
    for sentence, found in zip(MISTAKES, sentences, strict=True):
        assert found.startswith("graftvit: error: ")
        assert sentence in found


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ({"losses": [{}, {"layers": "x"}]}, r"^transfer.losses\[1\].layers='x' is not a choice"),
        (
            {"losses": [{"method": "feature", "layers": "0"}]},
            r"^transfer.losses\[0\].layers='0' changes nothing",
        ),
    ],
)
def test_an_entry_is_named(transfer: dict[str, Any], message: str) -> None:
    run = RunConfig.model_validate({"teacher": {"source": "t"}, "transfer": transfer})
    with pytest.raises((ConfigError, TransferError), match=message):
        check_first(run)
