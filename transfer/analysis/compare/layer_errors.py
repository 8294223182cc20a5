"""How far each converted layer is from its teacher's, on what the teacher's layer sees."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....models.attention.base import AttentionOperator
from ....models.attention.softmax import Softmax
from ....models.conversion import ConvertedAttention, converted_layers
from ....models.families import attention_blocks
from ....models.host import AttentionHost


class MeasuringAttention(AttentionHost):
    """The teacher's layer, which compares the student's layer of the same depth on what passes through."""

    def __init__(self, original: nn.Module, student: ConvertedAttention) -> None:
        super().__init__(original)
        self.pupil = (student,)  # in a tuple: not a part of the teacher
        self.squares: list[Tensor] = []
        """By batch: of the difference and of the teacher's output, sums over everything."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        (student,) = self.pupil
        target = Softmax()(self.project(x, rope, shared_rel_pos_bias))
        out = cast(AttentionOperator, student.operator)(student.project(x, rope, shared_rel_pos_bias))
        difference = (out - target).double().square().sum()
        self.squares.append(torch.stack([difference, target.double().square().sum()]))
        return self.merge(target, x)


@torch.no_grad()
def layer_errors(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor]) -> dict[int, float]:
    """Relative error of the output of each converted layer, ‖out − target‖ / ‖target‖ over all batches.

    Both outputs are per head and before the projection; the inputs are the teacher's at every layer. The images
    are normalised as the teacher's. Nothing is changed in either model.
    """
    view, layers = copy.deepcopy(teacher).eval(), converted_layers(student)
    blocks = attention_blocks(view)
    hosts = {}
    for index, layer in layers.items():
        hosts[index] = MeasuringAttention(cast(nn.Module, blocks[index].attn), layer)
        blocks[index].attn = hosts[index]
    student.eval()
    for images in batches:
        cast(Any, view).forward_features(images)
    totals = {index: torch.stack(host.squares).sum(0) for index, host in hosts.items()}
    return {index: float((total[0] / total[1]).sqrt()) for index, total in totals.items()}
