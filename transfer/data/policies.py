"""timm's auto-augment policies, with what newer versions of Pillow refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize


def keep_no_bits(steps: list[Any]) -> None:
    """Let the policy among `steps` posterize to 0 bits, which is black: Pillow 13 raises for it, older ones do not.

    timm asks for it wherever a magnitude reaches an end of its range. The operations of these steps are changed,
    not timm's table of them.
    """
    for operation in operations(steps):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def operations(steps: list[Any]) -> Iterator[Any]:
    """Yield the operations (timm's `AugmentOp`) of the policy among the steps of a transform, if there is one."""
    for step in steps:
        if isinstance(step, AutoAugment):
            for row in step.policy:
                yield from row
        elif isinstance(step, RandAugment | AugMixAugment):
            yield from step.ops


def _posterize(image: Image.Image, bits_to_keep: int, **keywords: Any) -> Image.Image:
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    kept: Image.Image = posterize(image, bits_to_keep, **keywords)
    return kept
