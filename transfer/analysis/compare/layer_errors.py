"""How far each converted layer is from its teacher's, on what the teacher's layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ....models.conversion import ConvertedAttention, converted_layers
from ....models.families import sites, vit
from ....models.grid_hosts import Call, watch_layer
from ....models.host import AttentionHost
from ....models.pyramid_conversion import sharing_copy


@torch.no_grad()
def layer_errors(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor]) -> dict[int, float]:
    """Return the relative error of the output of each converted layer, ‖out − target‖ / ‖target‖ over all batches.

    Both outputs are per head and before the projection; the inputs are the teacher's at every layer. The images
    are normalized as the teacher's. Both models are run in eval mode.
    """
    layers, teacher = converted_layers(student), sharing_copy(teacher)  # a pyramid's layers get hosts
    squares: dict[int, list[Tensor]] = {index: [] for index in layers}
    teacher.eval()
    student.eval()
    places = sites(teacher)
    hooks = [
        watch_layer(teacher, places[index], partial(_compare, layer, squares[index]))
        for index, layer in layers.items()
    ]
    try:
        for images in batches:
            vit(teacher).forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    totals = {index: torch.stack(found).sum(0) for index, found in squares.items()}
    return {index: float((total[0] / total[1]).sqrt()) for index, total in totals.items()}


def _compare(layer: ConvertedAttention, squares: list[Tensor], native: AttentionHost, call: Call) -> None:
    """Add the squares of the difference and of the teacher's output, over what the teacher's layer is given."""
    target = native.attend(native.heads_of(*call.inputs, **call.keywords))
    out = layer.operator(layer.heads_of(*call.inputs, **call.keywords))
    squares.append(torch.stack([each.double().square().sum() for each in (out - target, target)]))
