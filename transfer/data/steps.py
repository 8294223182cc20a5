"""The steps of a transform: one that fails is an error of one sentence, which says which and with what setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torchvision import transforms

from ...models.errors import DataError
from ..config import DataConfig
from .policies import operations

SETTINGS = {
    "RandomResizedCropAndInterpolation": "crop_scale",
    "RandomHorizontalFlip": "hflip",
    "RandAugment": "aa",
    "AutoAugment": "aa",
    "AugMixAugment": "aa",
    "RandomAffine": "aa",
    "ColorJitter": "color_jitter",
    "RandomErasing": "reprob",
    "Resize": "interpolation",
}
"""The setting of `data` that a step of training comes from."""


def training_settings(config: DataConfig) -> dict[str, str]:
    """Return the settings of `config` by the steps that come from them."""
    return {step: f"data.{key}={getattr(config, key)}" for step, key in SETTINGS.items()}


class StepError(DataError):
    """A step that failed on an image; the caller, which knows the image, names it."""


class OperationError(Exception):
    """An operation of an auto-augment policy that failed."""


class Steps(transforms.Compose):
    """As torchvision's `Compose`, raising StepError for whatever a step raises.

    Args:
        name: What the transform is for, as in "the training transform".
        settings: What a step comes from, by its type.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Any]], name: str, settings: Mapping[str, str]) -> None:
        super().__init__(list(steps))
        self._name = name
        self._settings = settings
        for operation in operations(self.transforms):
            operation.aug_fn = partial(_named, operation.name, operation.aug_fn)

    def __call__(self, image: Any) -> Any:
        for step in self.transforms:
            try:
                image = step(image)
            except MemoryError:
                raise
            except Exception as error:  # each library fails in its own way
                kind = type(step).__name__
                setting = f" ({self._settings[kind]})" if kind in self._settings else ""
                reason = error if isinstance(error, OperationError) else reason_of(error)
                raise StepError(f"{kind} of the {self._name} transform{setting} failed: {reason}") from error
        return image


def reason_of(error: Exception) -> str:
    """Return what happened, in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _named(name: str, function: Callable[..., Any], image: Any, *arguments: Any, **keywords: Any) -> Any:
    try:
        return function(image, *arguments, **keywords)
    except MemoryError:
        raise
    except Exception as error:
        raise OperationError(f"{name}: {reason_of(error)}") from error
