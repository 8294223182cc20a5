"""Identify weights in any place by a digest of their names, types, shapes and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .weights import Weights


def identify(weights: Weights) -> str:
    """Return the digest of a teacher: its tensors under timm's names, and its norms' epsilon if the source gives one.

    The same tensors have the same digest in any file and any container, and in any order.
    """
    return digest(weights.tensors, "" if weights.norm_eps is None else repr(weights.norm_eps))


def digest(tensors: Mapping[str, Tensor], said: str = "") -> str:
    """SHA-256 over the tensors, as hexadecimal digits; `said` is what else is part of what they are."""
    whole = hashlib.sha256(said.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        whole.update(f"\n{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        numbers = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(numbers.numpy().data)
    return whole.hexdigest()
