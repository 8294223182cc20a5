"""`graftvit.load`: a model to use or to train, from any source."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.copied import copying_of
from ..models.families import vit
from .fit import refuse_not_finite
from .pretrained import Pretrained, load_pretrained
from .timm_models import build

UNTRAINED_SEED = 20121  # one that nobody takes for a training


def load(source: str | Path, *, dtype: torch.dtype | None = None, **how: Any) -> nn.Module:
    """Return the model of any source, in eval mode and with gradients: a student (converted ones too) or a teacher.

    A student that copies its teacher's attention has the part of the teacher that it needs, which stays frozen.

    Args:
        source: a folder or file, `hf-hub:org/name`, a timm name; `#ema` behind a run's path takes its average.
        dtype: of the weights, float32 by default.
        how: `model`, `model_args`, `img_size`, `num_classes`, `bare` and the rest, as of `load_pretrained`.

    Raises CheckpointError: one sentence that names what is missing, damaged, unsafe, or does not fit.
    """
    model = load_pretrained(str(source), **how).model.requires_grad_(True)
    if copying_of(model) is not None:
        vit(model).teacher.requires_grad_(False)
    if dtype is None:
        return model
    tensors = model.state_dict()
    refuse_not_finite(str(source), tensors, dict.fromkeys(tensors, dtype))
    return model.to(dtype)


def build_untrained(loaded: Pretrained) -> nn.Module:
    """Return a copy of a model with random weights, the same ones at each call.

    Positions that were resampled to other images have no weights of timm's own start; they are drawn.
    """
    model = copy.deepcopy(loaded.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(UNTRAINED_SEED)
        fresh = dict(build(loaded.architecture, loaded.model_args).named_parameters())
        for name, parameter in model.named_parameters():
            if name in fresh and fresh[name].shape == parameter.shape:
                parameter.copy_(fresh[name])
            else:
                parameter.normal_(std=0.02)
    return model
