"""A model that is built without memory has the names, shapes and types of one with it."""

from __future__ import annotations

import pytest
import timm
import torch
from graftvit.models.small import without_memory
from support.models.dense import FAMILIES, TINY


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_memory_is_missing(family: str) -> None:
    name, options = FAMILIES[family]
    whole = timm.create_model(name, **{**TINY, **options}).state_dict()
    with without_memory():
        outlined = timm.create_model(name, **{**TINY, **options}).state_dict()
        assert torch.empty(2).is_meta
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in outlined.items()}
    assert described == {key: (tensor.shape, tensor.dtype) for key, tensor in whole.items()}
    assert all(tensor.is_meta for tensor in outlined.values())


def test_a_tensor_with_memory_is_filled_and_a_shape_that_does_not_fit_is_refused() -> None:
    with without_memory():
        assert torch.zeros(2, device="cpu").fill_(3.0).tolist() == [3.0, 3.0]
        with pytest.raises(RuntimeError, match="shape"):
            torch.empty(2, 3).add_(torch.empty(4))
