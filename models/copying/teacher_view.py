"""The teacher as a step runs it: up to the last block that is needed and, in it, up to what is needed.

A view shares every parameter and buffer with the teacher and changes nothing in it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from ..families import attention_blocks, vit
from ..host import AttentionHost
from .copying_operators import KeepHeads
from .tape import Tape

M = TypeVar("M", bound=nn.Module)
POST_NORM = (ResPostBlock, EvaBlockPostNorm)
AFTER_ATTENTION = ("norm", "gate", "proj", "proj_drop")
AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")


class LastAttention(nn.Module):
    """The attention of the last block that is needed, and nothing after it."""

    def __init__(self, block: nn.Module, host: AttentionHost, recorder: KeepHeads) -> None:
        super().__init__()
        self.norm1: nn.Module = (
            nn.Identity() if isinstance(block, POST_NORM) else block.get_submodule("norm1")
        )
        self.attn = host
        self.recorder = recorder
        _leave_out(host, AFTER_ATTENTION)

    def forward(self, x: Tensor, rope: Tensor | None = None, **options: Any) -> Tensor:
        heads = self.attn.project(self.norm1(x), rope, options.get("shared_rel_pos_bias"))
        if self.recorder.keep_output:
            self.recorder(heads)
        else:
            self.recorder.keep(heads)
        return x


class RecordedBlock(nn.Module):
    """A block that puts its output on the tape."""

    def __init__(self, block: nn.Module, layer: int, tape: Tape) -> None:
        super().__init__()
        self.block = block
        self.layer = layer
        self.tape = tape

    def forward(self, *args: Any, **options: Any) -> Any:
        out = self.block(*args, **options)
        self.tape.outputs[self.layer] = out
        return out


class TokensOnly(nn.Module):
    """A truncated model without its final norm, pooling and head, always in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _leave_out(model, AFTER_BLOCKS)
        self.model = model
        self.eval()

    @property
    def blocks(self) -> nn.Module:
        return vit(self.model).blocks

    def forward(self, images: Tensor) -> None:
        vit(self.model).forward_features(images)

    def train(self, mode: bool = True) -> TokensOnly:
        """Stay in eval mode."""
        return super().train(False)


def shallow(module: M) -> M:
    """A module with the same parameters and buffers whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def view_attention(
    teacher: nn.Module, layers: Collection[int], tape: Tape, parts: Collection[str], output: bool
) -> TokensOnly:
    """A view that records the projections `parts` (and the attention output) of `layers`, then stops."""
    last = max(layers)
    blocks: list[nn.Module] = []
    for index, block in enumerate(attention_blocks(teacher)[: last + 1]):
        twin = shallow(block)
        blocks.append(twin)
        if index not in layers:
            continue
        recorder = KeepHeads(index, tape, keep_output=output)
        if index == last:
            recorder.needs = parts if not output else recorder.needs
        host = AttentionHost(block.attn, recorder)
        twin._modules["attn"] = host
        if index == last:
            blocks[-1] = LastAttention(block, host, recorder)
    return truncated(teacher, blocks)


def view_blocks(teacher: nn.Module, layers: Collection[int], tape: Tape) -> TokensOnly:
    """A view that records the output of the blocks `layers`, then stops."""
    blocks = [shallow(block) for block in attention_blocks(teacher)[: max(layers) + 1]]
    return truncated(teacher, [RecordedBlock(b, i, tape) if i in layers else b for i, b in enumerate(blocks)])


def view_whole(teacher: nn.Module) -> nn.Module:
    """A view of the whole teacher."""
    return _with_blocks(teacher, [shallow(block) for block in attention_blocks(teacher)])


def truncated(teacher: nn.Module, blocks: Sequence[nn.Module]) -> TokensOnly:
    """The teacher with these blocks alone, and without what comes after them."""
    return TokensOnly(_with_blocks(teacher, blocks))


def _with_blocks(teacher: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    twin = shallow(teacher)
    sequential = isinstance(teacher.blocks, nn.Sequential)
    twin._modules["blocks"] = nn.Sequential(*blocks) if sequential else nn.ModuleList(blocks)
    return twin


def _leave_out(module: nn.Module, names: Collection[str]) -> None:
    """Put nothing in place of these children, where they are there."""
    for name in names:
        if module._modules.get(name) is not None:
            module._modules[name] = nn.Identity()
