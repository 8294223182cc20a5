"""The teacher as a step runs it: up to the last block that is needed and, in it, up to what is needed.

A view shares every parameter and buffer with the teacher and changes nothing in it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from ..any_timm import patch_features
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
        self.tape.blocks[self.layer] = out
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
    """Return a module with the same parameters and buffers whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


class WholeModel(nn.Module):
    """A whole teacher of timm, of any architecture, whose results go on the tape; always in eval mode."""

    def __init__(self, model: nn.Module, wanted: Collection[str], tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.wanted = frozenset(wanted)
        self.tape = tape
        self.eval()

    @property
    def blocks(self) -> nn.Module:
        return vit(self.model).blocks

    def forward(self, images: Tensor) -> None:
        model: Any = self.model
        whole = self.tape.whole
        features = model.forward_features(images)
        if "patches" in self.wanted:
            whole["patches"] = patch_features(self.model, features, (images.shape[-2], images.shape[-1]))
        if "pooled" in self.wanted:
            whole["pooled"] = model.forward_head(features, pre_logits=True)
        if "classes" in self.wanted:
            whole["classes"] = model.forward_head(features)

    def train(self, mode: bool = True) -> WholeModel:
        """Stay in eval mode."""
        return super().train(False)


@dataclass(frozen=True)
class Wanted:
    """The parts of a teacher that a step needs. `a | b` has the parts of both."""

    parts: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Projections to keep, by attention layer."""
    outputs: frozenset[int] = frozenset()
    """Attention layers whose output to keep, before the output projection."""
    blocks: frozenset[int] = frozenset()
    """Blocks whose output to keep."""
    whole: frozenset[str] = frozenset()
    """Results of the whole model: any of `WHOLE`."""

    @classmethod
    def attention(cls, layers: Collection[int], parts: Collection[str], *, output: bool = False) -> Wanted:
        """Return the projections `parts` of attention layers and, with `output`, their output."""
        kept = dict.fromkeys(layers, frozenset(parts))
        return cls(kept, frozenset(layers if output else ()))

    def __or__(self, other: Wanted) -> Wanted:
        layers = {*self.parts, *other.parts}
        none: frozenset[str] = frozenset()
        parts = {
            layer: self.parts.get(layer, none) | other.parts.get(layer, none) for layer in sorted(layers)
        }
        return Wanted(
            parts, self.outputs | other.outputs, self.blocks | other.blocks, self.whole | other.whole
        )

    @property
    def layers(self) -> frozenset[int]:
        """Blocks of which something is kept."""
        return frozenset(self.parts) | self.outputs | self.blocks


WHOLE = ("pooled", "patches", "classes")
"""Results of a whole model: the pooled feature (B, C), features of the patches (B, rows, columns, C) or
(B, N, C), logits (B, classes)."""


def view_teacher(teacher: nn.Module, wanted: Wanted, tape: Tape) -> nn.Module:
    """Return a view that puts what is `wanted` on the tape, and computes nothing beyond."""
    if wanted.whole and not wanted.layers:
        return WholeModel(shallow(teacher), wanted.whole, tape)
    blocks = [
        _view_block(block, index, wanted, tape) for index, block in enumerate(attention_blocks(teacher))
    ]
    if wanted.whole:
        return WholeModel(_with_blocks(teacher, blocks), wanted.whole, tape)
    last = max(wanted.layers)
    if last not in wanted.blocks:
        host: Any = blocks[last]._modules["attn"]
        if not host.operator.keep_output:
            host.operator.needs = wanted.parts[last]
        blocks[last] = LastAttention(attention_blocks(teacher)[last], host, host.operator)
    return truncated(teacher, blocks[: last + 1])


def view_attention(
    teacher: nn.Module, layers: Collection[int], tape: Tape, parts: Collection[str]
) -> nn.Module:
    """Return a view that records the projections `parts` of `layers`, then stops."""
    return view_teacher(teacher, Wanted.attention(layers, parts), tape)


def _view_block(block: nn.Module, index: int, wanted: Wanted, tape: Tape) -> nn.Module:
    twin = shallow(block)
    if index in wanted.parts or index in wanted.outputs:
        recorder = KeepHeads(index, tape, keep_output=index in wanted.outputs)
        twin._modules["attn"] = AttentionHost(block.get_submodule("attn"), recorder)
    return RecordedBlock(twin, index, tape) if index in wanted.blocks else twin


def truncated(teacher: nn.Module, blocks: Sequence[nn.Module]) -> TokensOnly:
    """Return the teacher with these blocks alone, and without what comes after them."""
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
