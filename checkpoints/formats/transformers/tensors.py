"""Change transformers' tensors where a new name is not enough: cut, fold, or change the rank for timm."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...weights import Weights


def fold_registers(weights: Weights) -> Weights:
    """DINOv2 with registers: the class token with its position, and the positions of the patches alone."""
    tensors = dict(weights.tensors)
    prefix = next(key for key in tensors if key.endswith("embeddings.cls_token")).removesuffix("cls_token")
    token, position = tensors[f"{prefix}cls_token"], tensors.get(f"{prefix}position_embeddings")
    if position is not None and position.ndim == 3 and token.shape == (1, 1, position.shape[2]):
        tensors[f"{prefix}cls_token"] = token + position[:, :1]
        tensors[f"{prefix}position_embeddings"] = position[:, 1:]
    return replace(weights, tensors=tensors)


def split_probe(weights: Weights) -> Weights:
    """SigLIP's pooling: the projection of its query apart from that of keys and values."""
    tensors = dict(weights.tensors)
    for key in [key for key in tensors if ".attention.in_proj_" in key]:
        stem, kind = key.rsplit("in_proj_", 1)
        joined = tensors[key]
        if joined.ndim and joined.shape[0] % 3 == 0:
            del tensors[key]
            query, rest = joined.tensor_split([joined.shape[0] // 3])
            tensors |= {f"{stem}q.{kind}": query, f"{stem}kv.{kind}": rest}
    return replace(weights, tensors=tensors)


def drop_empty_registers(weights: Weights) -> Weights:
    """DINOv3 without registers, whose token is there and empty."""
    empty = {
        key
        for key, tensor in weights.tensors.items()
        if key.endswith("register_tokens") and not tensor.numel()
    }
    left = dict.fromkeys(empty, "there are none")
    tensors = {key: tensor for key, tensor in weights.tensors.items() if key not in empty}
    return replace(weights, tensors=tensors, left_out={**weights.left_out, **left})


def as_batch(name: str, tensor: Tensor) -> Tensor:
    """CLIP's and SigLIP's tokens and positions with the batch axis that timm gives them."""
    if name == "pos_embed" and tensor.ndim == 2:
        return tensor[None]
    return tensor[None, None] if name == "cls_token" and tensor.ndim == 1 else tensor
