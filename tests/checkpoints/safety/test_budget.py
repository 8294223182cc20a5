"""The bound on what a constructor makes leaves larger images room."""

from __future__ import annotations

import pytest
import timm
from graftvit.checkpoints.architecture import build
from graftvit.models.errors import CheckpointError


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_224"])
def test_large_images_are_no_reason_to_refuse(name: str) -> None:
    weights = build(name, {}, on_meta=True).state_dict()
    model = build(name, {"img_size": 1024}, on_meta=True, within=weights)
    assert model.patch_embed.img_size == (1024, 1024)


@pytest.mark.slow
def test_a_model_far_larger_than_its_weights_is_refused() -> None:
    weights = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    with pytest.raises(CheckpointError, match="far larger than its weights"):
        build("vit_tiny_patch16_224", {"depth": 10**6}, on_meta=True, within=weights)
    with pytest.raises(CheckpointError, match="far larger than its weights"):
        build("beit_base_patch16_224", {"img_size": 4096}, on_meta=True, within=weights)
