"""The hub, through the real client, against a server on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.architecture import read_timm
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.sources import TimmSource
from graftvit.checkpoints.student import write_student
from graftvit.models.errors import CheckpointError
from huggingface_hub import constants
from safetensors.torch import save, save_file
from support.hub.hub_client import use_hub
from support.hub.hub_server import closed_port, serve
from torch import nn

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAME = "vit_tiny_patch16_224"
PUBLISHED = f"timm/{NAME}.augreg_in21k_ft_in1k"
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def sum_of(model: nn.Module) -> float:
    return sum(float(tensor.double().sum()) for tensor in model.state_dict().values())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, float]]]:
    """The address of a hub with org/vit at two commits and a published name of timm, and sums of their weights."""
    folder = tmp_path_factory.mktemp("hub")
    files: dict[tuple[str, str, str], bytes] = {}
    sums = {}
    arguments = {**SMALL, "img_size": 16, "patch_size": 4, "num_classes": 3}
    for revision, commit in COMMITS.items():
        model = timm.create_model(NAME, **arguments)
        write_student(
            model,
            folder / revision,
            architecture=NAME,
            model_args=arguments,
            preprocessing=Preprocessing.of(model, mean=(0.1,) * 3, std=(0.2,) * 3),
        )
        for path in (folder / revision).iterdir():
            files["org/vit", commit, path.name] = path.read_bytes()
        files["org/vit", commit, "README.md"] = b"---\nlicense: apache-2.0\n---\n"
        sums[revision] = sum_of(model)
    files["org/empty", COMMITS["main"], "config.json"] = files["org/vit", COMMITS["main"], "config.json"]
    files["org/bare", COMMITS["main"], "README.md"] = b""
    published = timm.create_model(NAME, **SMALL, num_classes=1000)
    files[PUBLISHED, COMMITS["main"], "model.safetensors"] = save(published.state_dict())
    sums["timm"] = sum_of(published)
    with serve(files, refs={"org/vit": COMMITS}) as server:
        yield server.url, sums


def refusal(source: str, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(source, model_args=arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_downloads_revisions_and_refusals(
    hub: tuple[str, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, sums = hub
    use_hub(monkeypatch, address, tmp_path)
    main, v1 = (load_pretrained(source) for source in ("hf-hub:org/vit", "hf-hub:org/vit@v1"))
    published = load_pretrained(PUBLISHED.removeprefix("timm/"), model_args=SMALL)
    assert [sum_of(teacher.model) for teacher in (main, v1, published)] == [
        sums["main"],
        sums["v1"],
        sums["timm"],
    ]
    assert [teacher.revision for teacher in (main, v1, published)] == ["a" * 40, "b" * 40, "a" * 40]
    assert [teacher.license for teacher in (main, published)] == ["apache-2.0"] * 2
    assert (main.mean, published.mean) == ((0.1,) * 3, (0.5,) * 3)
    assert main.has_head
    assert published.has_head
    assert f"org/absent is not on {address}: check the name" in refusal("hf-hub:org/absent")
    assert "org/vit has no revision 'v9'" in refusal("hf-hub:org/vit@v9")
    assert refusal("hf-hub:org/bare") == "org/bare has no 'config.json'; it has README.md"
    assert "hf-hub:org/empty has a config.json but no weights" in refusal("hf-hub:org/empty")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sum_of(load_pretrained("hf-hub:org/vit@v1").model) == sums["v1"]


def test_offline_mode_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for said in (refusal("hf-hub:org/vit"), refusal(PUBLISHED.removeprefix("timm/"), **SMALL)):
        assert "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download" in said


@pytest.fixture
def published_file(tmp_path: Path) -> tuple[Path, Callable[..., dict[str, Any]]]:
    path = tmp_path / "published.safetensors"
    return path, lambda **more: {
        **SMALL,
        "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3},
        **more,
    }


def test_a_timm_name_with_a_head_and_another_size(
    published_file: tuple[Path, Callable[..., dict[str, Any]]],
) -> None:
    path, arguments = published_file
    model = timm.create_model(NAME, **SMALL, num_classes=3)
    save_file(model.state_dict(), path)
    teacher = load_pretrained(NAME, model_args=arguments())
    assert teacher.architecture == NAME
    assert teacher.has_head
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(teacher.model(images), model.eval()(images))
    small = load_pretrained(NAME, model_args=arguments(), img_size=(64, 96), position_embedding="mae")
    assert small.report.resampled == {"pos_embed": "from grid 14x14 to 4x6 (mae's bicubic)"}
    assert small.model(torch.randn(1, 3, 64, 96)).shape == (1, 3)


def test_published_weights_that_do_not_load_end_in_one_sentence(
    published_file: tuple[Path, Callable[..., dict[str, Any]]],
) -> None:
    path, arguments = published_file
    tensors = timm.create_model(NAME, **SMALL, num_classes=3).state_dict()
    save_file({key: value for key, value in tensors.items() if key != "norm.bias"}, path)
    for damage in (lambda: None, lambda: path.write_bytes(path.read_bytes()[:90]), lambda: path.unlink()):
        damage()
        with pytest.raises(CheckpointError, match=r"vit_tiny_patch16_224") as caught:
            load_pretrained(NAME, model_args=arguments())
        assert "\n" not in str(caught.value)


def test_a_name_without_weights_names_others() -> None:
    with pytest.raises(CheckpointError, match=r"timm publishes no weights for 'vit_base_patch16_xp_224'"):
        read_timm(TimmSource("vit_base_patch16_xp_224"), {})
    with pytest.raises(
        CheckpointError, match=r"no tag 'may' of vit_large_patch16_224; valid: .*vit_large_patch16_224\.mae"
    ):
        load_pretrained("vit_large_patch16_224.may")
