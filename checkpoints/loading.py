"""`graftvit.load`: a model to use or to train, from any source."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .teacher import load_teacher


def load(source: str, *, dtype: torch.dtype | None = None, **how: Any) -> nn.Module:
    """The model of any source, in eval mode and with gradients: a saved student (converted ones too), a teacher.

    Args:
        source: a folder or file, `hf-hub:org/name`, a timm name; `#ema` behind a run's path takes its average.
        dtype: of the weights, float32 by default.
        how: `model`, `model_args`, `img_size`, `num_classes` and the rest, as of `load_teacher`.

    Raises CheckpointError: one sentence that names what is missing, damaged, unsafe, or does not fit.
    """
    model = load_teacher(source, **how).model.requires_grad_(True)
    return model if dtype is None else model.to(dtype)
