"""The teacher as a step runs it: up to the last block that is needed and, in it, up to what is needed.

A view shares every parameter and buffer with the teacher and changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.models.eva import EvaBlockPostNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from ..any_timm import patch_features
from ..attention.base import Operator
from ..families import Block, blocks_of, family_of, vit
from ..families import shallow as shallow
from ..grid_hosts import GridHost
from ..host import AttentionHost
from ..hosting import HOSTS, native_host
from ..shifted_windows import whole_grid
from .copying_operators import KeepHeads
from .tape import Tape

POST_NORM = (ResPostBlock, EvaBlockPostNorm, SwinTransformerV2Block)
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
        _leave_out(host, host.after_heads)

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        heads = self.attn.attended(self.attn.heads_of(self.norm1(x), *more, **options))
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
        self.tape.blocks[self.layer] = in_sequence(out)
        return out


def in_sequence(tokens: Tensor) -> Tensor:
    """Return the output of a block as (B, N, C); Swin gives (B, height, width, C)."""
    return tokens.flatten(1, 2) if tokens.dim() == 4 else tokens


class TokensOnly(nn.Module):
    """A truncated model without its final norm, pooling and head, always in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _leave_out(model, AFTER_BLOCKS)
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> None:
        vit(self.model).forward_features(images)

    def train(self, mode: bool = True) -> TokensOnly:
        """Stay in eval mode."""
        return super().train(False)


class WholeModel(nn.Module):
    """A whole teacher of timm, of any architecture, whose results go on the tape; always in eval mode."""

    def __init__(self, model: nn.Module, wanted: Collection[str], tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.wanted = frozenset(wanted)
        self.tape = tape
        self.eval()

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
    own = blocks_of(teacher)
    blocks = [_view_block(block, index, wanted, tape) for index, block in enumerate(own)]
    if wanted.whole:
        twin = family_of(teacher).with_blocks(teacher, blocks, cut=False)
        return WholeModel(twin, wanted.whole, tape)
    last = max(wanted.layers)
    if last not in wanted.blocks:
        host: Any = blocks[last]._modules["attn"]
        if not host.operator.keep_output:
            host.operator.needs = wanted.parts[last]
        blocks[last] = LastAttention(own[last], host, host.operator)
    return truncated(teacher, blocks[: last + 1])


def view_attention(
    teacher: nn.Module, layers: Collection[int], tape: Tape, parts: Collection[str]
) -> nn.Module:
    """Return a view that records the projections `parts` of `layers`, then stops."""
    return view_teacher(teacher, Wanted.attention(layers, parts), tape)


def _view_block(block: Block, index: int, wanted: Wanted, tape: Tape) -> nn.Module:
    twin: nn.Module = shallow(block)
    if index in wanted.parts or index in wanted.outputs:
        recorder = KeepHeads(index, tape, keep_output=index in wanted.outputs)
        host = recording_host(block, recorder)
        if isinstance(host, GridHost):
            twin = shallow(whole_grid(block))
        twin._modules["attn"] = host
    return RecordedBlock(twin, index, tape) if index in wanted.blocks else twin


def recording_host(block: Block, operator: Operator) -> AttentionHost:
    """Return a host of a block's attention with an operator that sees what timm's softmax sees."""
    if not isinstance(block.attn, tuple(HOSTS)):
        return AttentionHost(block.attn, operator)
    host = native_host(block)
    host.operator = operator
    return host


def truncated(teacher: nn.Module, blocks: Sequence[nn.Module]) -> TokensOnly:
    """Return the teacher with these blocks alone, its first ones, and without what comes after them."""
    return TokensOnly(family_of(teacher).with_blocks(teacher, blocks, cut=True))


def _leave_out(module: nn.Module, names: Collection[str]) -> None:
    """Put nothing in place of these children, where they are there."""
    for name in names:
        if module._modules.get(name) is not None:
            module._modules[name] = nn.Identity()
