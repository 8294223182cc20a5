"""Alignment: every converted layer learns, on the teacher's own inputs, to do what the teacher's layer does.

The teacher runs once without gradients. At each converted layer the student's layer gets the same input, so the
layers learn independently of one another and no gradient passes between them; no label is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.attention.base import Geometry
from ...models.conversion import ConvertedAttention, converted_layers
from ...models.copying.teacher_view import TokensOnly, shallow, truncated
from ...models.errors import TransferError
from ...models.families import blocks_of, check_supported, is_pyramid, patch_grid, sites, token_layout, vit
from ...models.grid_hosts import native_host
from ...models.host import AttentionHost
from ...models.map_structure import whole_grid
from .alike import check_alike, has_whole_map
from .layer_losses import LAYER_LOSSES, LayerLoss, LayerTarget, can_learn, check_layer_loss


class AlignedLayer(nn.Module):
    """The teacher's layer, which lets the student's layer of the same depth learn from what passes through."""

    def __init__(self, native: AttentionHost, student: ConvertedAttention, loss: LayerLoss) -> None:
        super().__init__()
        self.native = native
        self.pupil = (student,)  # in a tuple: not a part of the teacher
        self.loss = loss
        self.last_loss: Tensor | None = None

    def forward(self, x: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        heads = self.native.heads_of(x, *inputs, **keywords)
        target = LayerTarget(heads, self.native.attend(heads))
        (student,) = self.pupil
        with torch.enable_grad():
            own = student.heads_of(x, *inputs, **keywords)
            self.last_loss = self.loss(student.operator, own, target)
        return self.native.merge(target.output, x)


class Alignment(nn.Module):
    """Losses of all converted layers of `student` on the inputs of `teacher`; `forward(images)` gives them by layer.

    Teacher and student have the same depth, heads and tokens, as a model and its conversion do. The teacher is
    frozen, never registered, and stops after the last converted layer; a pyramid runs to its last block.

    Raises:
        TransferError: nothing is converted, the two differ, the loss is not one of an operator, or no layer can learn.
        UnsupportedModelError: no adapter covers the teacher.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, loss: str = "output") -> None:
        super().__init__()
        layers = converted_layers(student)
        check_supported(teacher, pyramids=True)
        if converted_layers(teacher):
            raise TransferError("the teacher is converted itself: give the model that it was converted from")
        if not layers:
            raise TransferError("nothing to align: no layer of the student is converted; give it a plan")
        check_alike(teacher, student, layers)
        for index, layer in layers.items():
            whole = has_whole_map(teacher, sites(teacher)[index])
            check_layer_loss(loss, index, str(layer.choice), layer.operator, whole_maps=whole)
        self._learning = [layer for layer in layers.values() if can_learn(loss, layer.operator)]
        if not self._learning:
            names = ", ".join(sorted({str(layer.choice) for layer in layers.values()}))
            raise TransferError(
                f"align.match={loss}: the maps of {names} depend on no parameter, so no layer would learn; use output"
            )
        self.student = student
        self._hosts: dict[int, AlignedLayer] = {}
        self._view = (self._teach(teacher, layers, LAYER_LOSSES[loss]),)

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the layers that learn."""
        return list(self._hosts)

    def _teach(
        self, teacher: nn.Module, layers: dict[int, ConvertedAttention], loss: LayerLoss
    ) -> TokensOnly:
        """Return the teacher up to its last layer that teaches."""
        blocks: list[nn.Module] = []
        for index, block in enumerate(blocks_of(teacher)[: max(layers) + 1]):
            twin = shallow(whole_grid(block) if index in layers else block)
            if index in layers:
                native = native_host(block) if is_pyramid(teacher) else AttentionHost(block.attn)
                self._hosts[index] = AlignedLayer(native, layers[index], loss)
                twin._modules["attn"] = self._hosts[index]
            blocks.append(twin)
        return truncated(teacher, blocks).eval()

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return the loss of each converted layer, a float32 scalar with a gradient for that layer alone."""
        (view,) = self._view
        if not is_pyramid(self.student):  # whose layers are given their grid
            self._take_grid(vit(view.model).patch_embed, (images.shape[-2], images.shape[-1]))
        with torch.no_grad():
            view(images)
        losses = {}
        for index, host in self._hosts.items():
            assert host.last_loss is not None
            losses[index], host.last_loss = host.last_loss, None
        return losses

    def _take_grid(self, embedding: nn.Module, images: tuple[int, int]) -> None:
        """Let the student's operators have the teacher's grid of these images: their own model does not run.

        TransferError where the student has one grid, and this is another.
        """
        grid, student = patch_grid(embedding, images), vit(self.student)
        own = token_layout(student).grid
        if grid != own and student.patch_embed.strict_img_size:
            raise TransferError(
                f"images of {images[0]}x{images[1]} have the patch grid {grid[0]}x{grid[1]} in the teacher, and the "
                f"student has {own[0]}x{own[1]} alone: align them on images of the student's size"
            )
        for layer in converted_layers(student).values():
            layer.tokens.geometry = Geometry(layer.tokens.geometry.num_prefix, grid)

    def used_parameters(self) -> list[nn.Parameter]:
        """Return the student's parameters that a loss depends on: of layers that learn, all but the output
        projection."""
        return [
            parameter
            for layer in self._learning
            for name, child in layer.named_children()
            if name not in ("proj", "norm", "gate")
            for parameter in child.parameters()
        ] + [p for layer in self._learning for p in layer.parameters(recurse=False)]

    def freeze_others(self) -> None:
        """Freeze all parameters of the student but those that a loss depends on."""
        used = {id(parameter) for parameter in self.used_parameters()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in used)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Alignment:
        self._view[0]._apply(fn)  # the teacher is no part of the module, but goes where it goes
        super()._apply(fn, recurse)
        return self
