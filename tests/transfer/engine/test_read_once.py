"""Weights and states that the first of several processes reads for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.models.errors import CheckpointError
from graftvit.transfer.engine.parallel import from_first, outline_of, patient, read_once, receive
from support.models.dense import tiny
from support.runs.scenarios import NEEDS_FSDP, RunScenario


def test_one_process_reads_for_itself() -> None:
    model = tiny(seed=1)
    kept = dict(model.named_parameters())
    assert read_once(lambda: model, None, outline_of) is model
    weight = kept["head.weight"]
    assert from_first(weight, None) is weight
    receive(model, None)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    with patient(None) as group:
        assert group is None

    def fail() -> None:
        raise CheckpointError("cut")

    with pytest.raises(CheckpointError, match="cut"):
        read_once(fail, None)


def test_an_outline_has_shapes_and_no_memory() -> None:
    model = tiny(seed=1).requires_grad_(False)
    outline = outline_of(model)
    assert {name: each.shape for name, each in outline.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }
    assert all(each.is_meta and not each.requires_grad for each in outline.parameters())
    assert not any(each.is_meta for each in model.parameters())


@NEEDS_FSDP
@pytest.mark.slow
def test_one_process_opens_the_state_and_the_others_hold_less_than_the_weights(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("engine_reads", "starts", tmp_path)
    assert report["before"] == [0], report["stderr"]
    assert all(ends == [0] * 8 for ends, _ in report["found"].values()), report["stderr"]
    (_, small), sizes = report["found"]["small"], report["sizes"]
    for name, files in (
        ("new", {"model.safetensors"}),
        ("resumed", {"model.safetensors", "last.safetensors"}),
    ):
        _, found = report["found"][name]
        assert {Path(path).name for path in found[0]["opened"]} == files
        others = [{Path(path).name for path in each["opened"]} for each in found[1:]]
        assert others == [{"model.safetensors"}] * 7  # its rows of the teacher
        grown = [own["peak"] - least["peak"] for own, least in zip(found, small, strict=True)]
        assert max(grown[1:]) < min(sizes.values()), (name, grown, sizes)


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_one_error_on_every_process(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("engine_reads", "failures", tmp_path)
    for kind, found in report["found"].items():
        assert found["ends"] == [found["ends"][0]] * 3, report["stderr"]
        assert found["ends"][0] in (1, 2), kind
        assert found["texts"][0], kind
        assert set(found["texts"]) == {found["texts"][0]}, kind
    words: dict[str, Any] = {kind: found["texts"][0] for kind, found in report["found"].items()}
    assert "has a config.json but no weights" in words["missing"]
    assert "model.safetensors" in words["short"]
    assert "blocks.0.attn.qkv.weight" in words["keys"]
    assert "no whole state is left" in words["state"]


@pytest.mark.slow
def test_a_killed_reader_ends_the_others(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("engine_reads", "killed", tmp_path)
    for ends in report["ends"]:
        assert ends[0] == -9
        assert all(end not in (0, -9) for end in ends[1:]), report["stderr"]
    assert report["last"] == [0], report["stderr"]
