"""A model that shows its features: the input of its head, and the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...models.attention.kernels import precise
from ...models.families import attention_blocks, pooling_of, vit

Predictor = Callable[[Tensor], Tensor]


@dataclass
class Reading:
    """Of one batch. DeiT's two heads read two tokens, and the mean of these is the feature."""

    logits: Tensor
    feature: Tensor
    """In float32."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (B, N, D)."""


class Reader:
    """`reader(images)` runs `predict`, in which `model` takes part, and keeps what passes through the model.

    The feature is the input of the model's classifier, which timm leaves in place as an identity where there is no
    head; tokens that are not pooled before it are averaged. The same images in a row are run once.
    """

    def __init__(
        self, model: nn.Module, predict: Predictor | None = None, layers: Collection[int] = ()
    ) -> None:
        self.model = model
        self._predict = model if predict is None else predict
        self._layers = layers
        self._last: tuple[Tensor, Reading] | None = None

    def __call__(self, images: Tensor) -> Reading:
        if self._last is None or self._last[0] is not images:
            self._last = images, self._read(images)
        return self._last[1]

    def logits(self, images: Tensor) -> Tensor:
        """Return what the head gives, (B, classes)."""
        return self(images).logits

    def feature(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D)."""
        return self(images).feature

    def forget(self) -> None:
        """Let go of the last images: the weights may change."""
        self._last = None

    def _read(self, images: Tensor) -> Reading:
        features: list[Tensor] = []
        blocks: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for head in _classifiers(self.model):
                hooks.callback(head.register_forward_pre_hook(partial(_keep_input, features)).remove)
            for layer in self._layers:
                block = attention_blocks(self.model)[layer]
                hooks.callback(block.register_forward_hook(partial(_keep_output, blocks, layer)).remove)
            logits = self._predict(images)
        return Reading(logits, torch.stack([_pooled(feature) for feature in features]).mean(0), blocks)


def describe_features(model: nn.Module) -> str:
    """Describe the features that nearest neighbors and a probe read: their number, and the pooling before the head."""
    pooling = pooling_of(model)
    pooled = "averaged over all tokens" if pooling == "" else f"pooled by {pooling or 'its own head'}"
    return f"{vit(model).head_hidden_size} features of an image, {pooled}"


def _classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    found = vit(model).get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _keep_input(kept: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    kept.append(inputs[0])


def _keep_output(kept: dict[int, Tensor], layer: int, _: nn.Module, inputs: object, output: Tensor) -> None:
    kept[layer] = output


def _pooled(feature: Tensor) -> Tensor:
    feature = precise(feature)
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(1)
