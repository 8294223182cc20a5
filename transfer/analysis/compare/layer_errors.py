"""How far each converted layer is from its teacher's, on what the teacher's layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ....models.attention.softmax import Softmax
from ....models.conversion import ConvertedAttention, converted_layers
from ....models.families import attention_blocks, vit
from ....models.host import AttentionHost, Given, observe


@torch.no_grad()
def layer_errors(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor]) -> dict[int, float]:
    """Return the relative error of the output of each converted layer, ‖out − target‖ / ‖target‖ over all batches.

    Both outputs are per head and before the projection; the inputs are the teacher's at every layer. The images
    are normalized as the teacher's. Both models are run in eval mode.
    """
    layers, blocks = converted_layers(student), attention_blocks(teacher)
    squares: dict[int, list[Tensor]] = {index: [] for index in layers}
    teacher.eval()
    student.eval()
    hooks = []
    for index, layer in layers.items():
        original = blocks[index].attn
        hooks.append(observe(original, partial(_compare, layer, original, squares[index])))
    try:
        for images in batches:
            vit(teacher).forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    totals = {index: torch.stack(found).sum(0) for index, found in squares.items()}
    return {index: float((total[0] / total[1]).sqrt()) for index, total in totals.items()}


def _compare(layer: ConvertedAttention, original: nn.Module, squares: list[Tensor], given: Given) -> None:
    """Add the squares of the difference and of the teacher's output, over what the teacher's layer is given."""
    target = Softmax()(AttentionHost(original).project(*given))
    out = layer.operator(layer.project(*given))
    squares.append(torch.stack([each.double().square().sum() for each in (out - target, target)]))
