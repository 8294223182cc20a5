"""Calibration: fit each new operator to its teacher layer on a batch of images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from .attention.base import AttentionOperator, Fit, Heads
from .errors import UnsupportedModelError
from .families import evaluating, family_of, sites
from .host import AttentionHost
from .hosting import Call, watch_layer

if TYPE_CHECKING:
    from .converted import ConvertedAttention


@dataclass(frozen=True)
class Layer:
    """The result of a calibrated layer: the tensors of its operator, and what is reported of it."""

    tensors: Mapping[str, Tensor]
    calibration: tuple[float, float] | None
    fit: Fit | None


class Finished(Protocol):
    """Keeps finished layers; `key` names everything that a result depends on."""

    def load(self, index: int, key: str) -> Layer | None: ...

    def save(self, index: int, key: str, layer: Layer) -> None: ...


def calibrate(operator: AttentionOperator, heads: Heads, target_BHND: Tensor) -> tuple[float, float]:
    """Calibrate an operator and return its relative output error ‖out − target‖ / ‖target‖ before and after.

    If calibration increases the error, restore the parameters.
    """
    start, before = copy.deepcopy(operator.state_dict()), _error(operator, heads, target_BHND)
    operator.calibrate(heads, target_BHND)
    after = _error(operator, heads, target_BHND)
    if after <= before:
        return before, after
    operator.load_state_dict(start)
    return before, before


def calibrate_layers(
    teacher: nn.Module,
    layers: Mapping[int, ConvertedAttention],
    images: Tensor,
    *,
    seed: int = 0,
    finished: Finished | None = None,
) -> None:
    """Fit and calibrate the converted `layers` (by number) on `images` (B, 3, H, W), one after another.

    Each layer sees the input of the layer of `teacher` in its place, so no layer depends on another one. `teacher` is
    the model that was converted, and its layers may get hosts. Layers that `finished` has are not fitted again.

    Raises UnsupportedModelError: the size of the images is not the teacher's.
    """
    places = sites(teacher)
    hooks = [
        watch_layer(teacher, places[index], partial(_calibrate_layer, layer, index, seed, finished))
        for index, layer in layers.items()
    ]
    like = next(teacher.parameters())
    try:
        with torch.no_grad(), evaluating(teacher, *layers.values()):
            family_of(teacher).features(teacher, images.to(like))
    except AssertionError as error:  # raised by timm's patch embedding
        size = "x".join(map(str, images.shape[-2:]))
        raise UnsupportedModelError(f"calibration images of {size} do not fit the model: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def fit_layers(model: nn.Module, layers: Mapping[int, ConvertedAttention], images: Tensor, seed: int) -> None:
    """Fit the `layers` of a converted model without a teacher, each to the input that the layers before it give it."""

    def fit(index: int, module: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object]) -> None:
        layer = layers[index]
        layer.fit = layer.operator.fit([layer.heads_of(*inputs, **keywords)], seed=seed + index)

    hooks = [
        layer.register_forward_pre_hook(partial(fit, index), with_kwargs=True)
        for index, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluating(model):
            family_of(model).features(model, images.to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()


def fit_at_random(layers: Mapping[int, ConvertedAttention]) -> None:
    """Make operators run that were never fitted, with codes of no use: for measurements of speed."""
    for index, layer in layers.items():
        if not layer.operator.fitted:
            layer.operator.fit([], seed=index)


def _calibrate_layer(
    layer: ConvertedAttention,
    index: int,
    seed: int,
    finished: Finished | None,
    native: AttentionHost,
    call: Call,
) -> None:
    """Fit and calibrate a layer on the input of the teacher's layer of the same depth, unless it is finished."""
    heads = layer.heads_of(*call.inputs, **call.keywords)
    key = "" if finished is None else _key(layer, seed, heads)
    done = None if finished is None else finished.load(index, key)
    if done is not None:
        layer.operator.load_state_dict(dict(done.tensors))
        layer.fit, layer.calibration = done.fit, done.calibration
        return
    target = native.attend(native.heads_of(*call.inputs, **call.keywords))
    layer.fit = layer.operator.fit([heads], seed=seed + index)
    layer.calibration = calibrate(layer.operator, heads, target)
    if finished is not None and layer.operator.state_dict().keys() - {"choice"}:
        finished.save(index, key, Layer(layer.operator.state_dict(), layer.calibration, layer.fit))


def _key(layer: ConvertedAttention, seed: int, heads: Heads) -> str:
    """Return a digest of the operator, its start, the seed and the layer's input."""
    found = hashlib.blake2b(f"{layer.choice} {seed} {tuple(heads.known.shape)}".encode(), digest_size=16)
    for tensor in (heads.q, heads.k, heads.v, *layer.operator.state_dict().values()):
        if tensor is not None:
            found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _error(operator: AttentionOperator, heads: Heads, target: Tensor) -> float:
    with torch.no_grad():
        difference = operator(heads).float() - target.float()
    return float(difference.norm() / target.float().norm().clamp_min(1e-30))
