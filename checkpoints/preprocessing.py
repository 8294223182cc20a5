"""Describe how an image becomes a model's input: read it from timm's description of weights, and write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from ..models.copying.teacher_view import LARGEST
from ..models.errors import CheckpointError, Json, JsonDict
from ..models.families import find_family, image_size
from .report import shortened

CROP_MODES = ("center", "squash", "border")
MOST_CHANNELS = 10_000
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """The input of a model, under the names of timm's `pretrained_cfg`.

    Evaluation resizes an image so that `crop_pct` of a side is `input_size`, and crops by `crop_mode` (center, squash
    or border, as timm has them); values 0..1 are normalized by `mean` and `std`, one number a channel.
    """

    input_size: tuple[int, int, int]
    """Channels, height, width."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    @classmethod
    def read(cls, described: Json, input_size: tuple[int, int, int] | None = None) -> Preprocessing:
        """Read timm's description of weights; use timm's defaults for missing fields.

        `input_size` is that of the model at hand. Another number of channels than the description's takes the mean and
        deviation of its first channel.
        """
        for name in ("mean", "std", "crop_pct"):  # timm would take its default for what counts as nothing
            if described.get(name) is not None and not described[name]:
                raise CheckpointError(
                    f"the description of the weights says {name}={shortened(described[name])}"
                )
        found = resolve_data_config(pretrained_cfg={"input_size": None, **described})
        try:
            channels, height, width = input_size or found["input_size"]
            mean, std = (_by_channel(found[name], min(channels, MOST_CHANNELS)) for name in ("mean", "std"))
            crop = float(found["crop_pct"]), found["crop_mode"], found["interpolation"]
            read = cls((channels, height, width), mean, std, *crop)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the description of the weights says no such images as {shortened(found)}: {error}"
            ) from error
        read._check()
        return read

    @classmethod
    def of(cls, model: nn.Module, **own: Any) -> Preprocessing:
        """Read the `pretrained_cfg` of a timm model at its resolution; fields of `own` override it."""
        described = {**(getattr(model, "pretrained_cfg", None) or {}), **own}
        return cls.read(described, input_size(model, described))

    def _check(self) -> None:
        """CheckpointError where no image can be made so."""
        channels = self.input_size[0]
        numbers = {
            "input_size": all(type(side) is int and side > 0 for side in self.input_size)
            and channels <= MOST_CHANNELS,
            "mean": len(self.mean) == channels and all(abs(value) <= LARGEST for value in self.mean),
            "std": len(self.std) == channels and all(1 / LARGEST <= value <= LARGEST for value in self.std),
            "crop_pct": 0 < self.crop_pct <= 1,
            "crop_mode": self.crop_mode in CROP_MODES,
            "interpolation": self.interpolation in INTERPOLATIONS,
        }
        wrong = next((name for name, valid in numbers.items() if not valid), None)
        if wrong is not None:
            raise CheckpointError(
                f"the description of the weights says {wrong}={shortened(getattr(self, wrong))}, and valid are sizes "
                f"above 0, at most {MOST_CHANNELS:,} channels, "
                f"means from {-LARGEST:,.0f} to {LARGEST:,.0f}, deviations from {1 / LARGEST:g} to "
                f"{LARGEST:,.0f}, a crop_pct from 0 to 1, crop_mode {', '.join(CROP_MODES)}, "
                f"interpolation {', '.join(INTERPOLATIONS)}"
            )

    def described(self) -> JsonDict:
        """Return the fields of timm's `pretrained_cfg`; JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's own transform of evaluation: what anyone gets who asks timm for it."""
        return create_transform(**asdict(self), is_training=False)

    def describe(self) -> str:
        """Return a description in words, for a plan or a log."""
        channels, height, width = self.input_size
        return (
            f"{channels}x{height}x{width}, mean {_numbers(self.mean)}, std {_numbers(self.std)}; "
            f"evaluated at {self.crop_pct:g} of a side, {self.crop_mode}, {self.interpolation}"
        )


def input_size(model: nn.Module, described: Json | None = None) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images; what `described` says where the model leaves it open."""
    channels, height, width = (described or {}).get("input_size") or (3, 224, 224)
    family, projection = find_family(model), getattr(getattr(model, "patch_embed", None), "proj", None)
    channels = getattr(projection, "in_channels", channels) if family is None else family.channels(model)
    height, width = image_size(model) or (height, width)
    return int(channels), int(height), int(width)


def _by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(map(float, values))
    if 1 < len(values) < channels:
        raise ValueError(f"{len(values)} numbers for {channels} channels")
    return values if len(values) == channels else values[:1] * channels


def _numbers(values: Sequence[float]) -> str:
    """Return one number if all are the same."""
    return ", ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))
