"""Names of timm: their weights come from the hub like any others, at the commit that is asked for."""

from __future__ import annotations

import io
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.architecture import read_timm
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.sources import TimmSource
from graftvit.models.errors import CheckpointError
from safetensors.torch import save
from support.hub.hub_server import COMMIT, TOKEN, Fault, Hub
from torch import Tensor

NAME = "vit_large_patch16_224.mae"
REPOSITORY = f"timm/{NAME}"
OLD = "b" * 40
WEIGHTS = "model.safetensors"
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, num_classes=0, global_pool="token", **SMALL)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.fixture
def published(server: Hub, client: None) -> dict[str, dict[str, Tensor]]:
    """What timm's repository of the name has at its two commits."""
    by_commit = {COMMIT: tensors(0), OLD: tensors(1)}
    for commit, state in by_commit.items():
        server.files[REPOSITORY, commit, WEIGHTS] = save(state)
    server.refs[REPOSITORY] = {"main": COMMIT, "v1": OLD}
    return by_commit


def same(teacher: Any, state: dict[str, Tensor]) -> bool:
    found = teacher.model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLD), (OLD, OLD), (COMMIT, COMMIT)]
)
def test_a_revision_loads_exactly_that_commit(
    published: dict[str, dict[str, Tensor]], revision: str | None, commit: str
) -> None:
    teacher = load_pretrained(NAME, model_args=SMALL, revision=revision)
    assert same(teacher, published[commit])
    assert teacher.revision == teacher.report.revision == commit
    assert teacher.license == "cc-by-nc-4.0"


def refused(revision: str | None = None, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(NAME, model_args={**SMALL, **arguments}, revision=revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("published")
def test_refusals_are_those_of_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("v2") == f"{REPOSITORY} has no revision 'v2': it has main, v1"
    server.faults.append(Fault(content=b"other", method="GET", where="/cdn/", times=1000))
    assert refused().startswith(f"{REPOSITORY} cannot be downloaded: ")
    server.faults.clear()
    server.gated.add(REPOSITORY)
    assert refused().startswith(f"{REPOSITORY} is gated: accept its terms on {server.url}/{REPOSITORY}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in refused()


def test_weights_that_are_damaged_on_the_hub_itself_end_in_one_sentence(
    server: Hub, published: dict[str, dict[str, Tensor]]
) -> None:
    server.files[REPOSITORY, COMMIT, WEIGHTS] = b"\x08" * 100
    assert refused().startswith(f"timm cannot load the weights of {NAME!r}: ")
    del published[OLD]["norm.weight"], published[OLD]["cls_token"]
    server.files[REPOSITORY, OLD, WEIGHTS] = save(published[OLD])
    assert "norm.weight" in refused("v1")


def test_a_pickle_is_taken_where_there_is_no_safetensors_file(
    server: Hub, published: dict[str, dict[str, Tensor]]
) -> None:
    del server.files[REPOSITORY, OLD, WEIGHTS]
    stream = io.BytesIO()
    torch.save(published[OLD], stream)
    server.files[REPOSITORY, OLD, "pytorch_model.bin"] = stream.getvalue()
    assert same(load_pretrained(NAME, model_args=SMALL, revision=OLD), published[OLD])


def test_a_repository_without_weights_says_what_it_has(
    server: Hub, published: dict[str, dict[str, Tensor]]
) -> None:
    del server.files[REPOSITORY, OLD, WEIGHTS]
    server.files[REPOSITORY, OLD, "README.md"] = b""
    assert refused(OLD).startswith(f"{REPOSITORY} has no 'pytorch_model.bin'")


@pytest.mark.usefixtures("client")
def test_a_revision_of_weights_at_an_address_is_refused(server: Hub) -> None:
    name = "vit_huge_patch14_gap_224.in1k_ijepa"
    with pytest.raises(CheckpointError) as caught:
        read_timm(TimmSource(name, "main"), {})
    address = timm.get_pretrained_cfg(name).url
    assert str(caught.value) == (
        f"revision='main' is of the hub, and timm takes {name!r} from {address}: leave it out"
    )
    assert not server.requests


@pytest.mark.usefixtures("published")
def test_a_file_of_the_callers_own_has_no_revision(server: Hub) -> None:
    said = refused("main", pretrained_cfg_overlay={"file": "own.safetensors"})
    assert said.endswith("timm takes 'vit_large_patch16_224.mae' from own.safetensors: leave it out")
    assert not server.requests


def test_a_commit_in_timms_own_description_is_kept(
    published: dict[str, dict[str, Tensor]],
) -> None:
    pinned = {"pretrained_cfg_overlay": {"hf_hub_id": f"{REPOSITORY}@{OLD}"}}
    assert same(load_pretrained(NAME, model_args={**SMALL, **pinned}), published[OLD])


@pytest.mark.usefixtures("published")
def test_the_weights_are_not_kept_under_a_place_on_this_disk() -> None:
    weights = read_timm(TimmSource(NAME), SMALL)
    assert weights.revision == COMMIT
    assert not {"file", "state_dict"} & weights.pretrained_cfg.keys()
    assert weights.pretrained_cfg["hf_hub_id"] == REPOSITORY
