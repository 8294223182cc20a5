"""What the notebooks share: the digits as tensors, a small vision transformer, and a loop of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from graftvit.transfer.data.digits import DigitsSource
from torch import Tensor, nn


def read_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images of `train` or `validation`, (B, 1, 8, 8) with values from -1 to 1, and their labels."""
    source = DigitsSource(split, "L")
    pictures = np.stack([np.array(source.read(number)[0]) for number in range(len(source))])
    return torch.from_numpy(pictures)[:, None] / 127.5 - 1, torch.tensor(source.targets)


def few_of_each(labels: Tensor, count: int) -> Tensor:
    """Return the numbers of the first `count` images of each class."""
    return torch.cat([torch.where(labels == label)[0][:count] for label in labels.unique()])


def create_vit(seed: int = 0, **arguments: Any) -> nn.Module:
    """Return a vision transformer of timm with fresh weights: 16 patches, 3 layers of 3 heads, 90,000 weights."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
    }
    seen = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    given = {"num_classes": 10, "global_pool": "avg", "pretrained_cfg_overlay": seen, **size, **arguments}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **given)
    # timm begins with nearly equal places, and needs many steps to tell them apart
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.2)
    return model


def fit(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    steps: int = 200,
) -> None:
    """Minimize `loss` of batches of 64 images and their labels over the parameters of `module`, by AdamW."""
    torch.manual_seed(0)
    learned = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    module.train()
    for _ in range(steps):
        batch = torch.randperm(len(images))[:64]
        optimizer.zero_grad()
        loss(images[batch], labels[batch]).backward()
        optimizer.step()
        schedule.step()
    module.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a model classifies right."""
    return (model(images).argmax(1) == labels).double().mean().item()
