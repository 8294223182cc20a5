"""Gradient checkpointing: blocks run again in the backward pass with the inputs of their own forward pass.

timm's gradient checkpointing keeps the callables in `model.blocks`, of a pyramid in the `blocks` of each stage, and
calls them again in the backward pass. For each forward pass, `blocks` gets callables that store its inputs. A stage
that is itself a list of blocks has `blocks` in the meantime.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .errors import TransferError
from .families import any_family

_State = tuple[bool, list[tuple[int, ...]], list[tuple[object, ...]]]


class Moment(Protocol):
    """The data that the blocks of one forward pass read beside their input."""

    def is_now(self) -> bool:
        """Return whether the blocks read this data now."""

    def again(self) -> AbstractContextManager[None]:
        """Return a context in which the blocks read this data again."""


@dataclass(eq=False)
class ReplayedBlock:
    """A block in one forward pass and in the backward passes that run it again."""

    block: nn.Module
    model: nn.Module
    """The model or the stage that runs the block."""
    name: str
    """The list in it that has the block."""
    moments: Sequence[Moment]
    state: _State | None = field(default=None, init=False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.state is None:
            return self._first(*args, **options)
        if self.state != _state(self.block):
            raise TransferError(
                "the student's weights, its modules or its mode (train, eval) changed between a forward pass and its "
                "backward pass, which runs the blocks again (grad_checkpointing=true): change them afterwards"
            )
        with ExitStack() as stack:
            for moment in self.moments:
                stack.enter_context(moment.again())
            return self.block(*args, **options)

    def _first(self, *args: Any, **options: Any) -> Any:
        _restore(self.model, self.name)
        if not torch.is_grad_enabled():
            raise TransferError(
                "torch's re-entrant checkpointing gives no gradient for the transfer loss: unset TIMM_REENTRANT_CKPT"
            )
        self.state = _state(self.block)
        return self.block(*args, **options)


def replay_blocks(model: nn.Module, moment: Moment) -> None:
    """If the next forward pass of `model` is checkpointed, let its backward pass read `moment` again."""
    for stage, name in _stages(model):
        _replay(stage, name, moment)


def restore_blocks(model: nn.Module) -> None:
    """Restore `blocks` to the model's own blocks, of a pyramid in each stage."""
    for stage, name in _stages(model):
        _restore(stage, name)


def _stages(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the model, or the stages of a pyramid that can be checkpointed, with the name of their lists of parts."""
    family = any_family(model)
    if family is None:
        return [(model, "blocks")]
    return [(stage, name) for stage in family.recomputed(model) for name in family.rerun]


def _replay(stage: nn.Module, name: str, moment: Moment) -> None:
    before: list[ReplayedBlock] = stage.__dict__.get(name, [])
    _restore(stage, name)  # an interrupted forward pass may have left its own
    recomputes = bool(getattr(stage, "grad_checkpointing", False)) and torch.is_grad_enabled()
    if not recomputes or torch.compiler.is_compiling():  # a compiled graph stores its inputs
        return
    moments = [*(each for block in before[:1] for each in block.moments if each.is_now()), moment]
    own = stage if isinstance(stage, nn.ModuleList) else stage._modules.get(name)
    blocks = [ReplayedBlock(block, stage, name, moments) for block in (() if own is None else own.children())]
    object.__setattr__(stage, name, blocks)  # hides the module of that name, which stays registered


def _restore(stage: nn.Module, name: str) -> None:
    stage.__dict__.pop(name, None)


def _state(block: nn.Module) -> _State:
    """Return what may change in a block: its mode, modules, hooks, and the versions of its parameters."""
    modules = list(block.modules())
    parts = [(id(module), *module._forward_hooks) for module in modules]
    if isinstance(block, FSDPModule):  # it gathers its parameters in between
        return block.training, parts, []
    weights: list[tuple[object, ...]] = [
        (id(each), each._version, each.untyped_storage()._cdata, each.storage_offset())
        for each in block.parameters()
    ]
    return block.training, parts, weights
