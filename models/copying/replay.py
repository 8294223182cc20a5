"""Blocks that a backward pass runs again: each reads what its own forward pass gave it, whatever ran in between.

timm's gradient checkpointing keeps the callables that it finds in `model.blocks` and calls them again in the backward
pass. For one forward pass it is given callables that hold the `Step` of that pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import TransferError
from ..families import attention_blocks
from .tape import Step, Tape

_State = tuple[bool, list[tuple[int, ...]], list[tuple[int, int]]]


@dataclass(eq=False)
class ReplayedBlock:
    """A block in one forward pass, and in the backward passes that run it again."""

    block: nn.Module
    model: nn.Module
    tape: Tape
    step: Step
    state: _State | None = field(default=None, init=False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.state is None:
            return self._first(*args, **options)
        if self.state != _state(self.block):
            raise TransferError(
                "the student's weights, its modules or its mode (train, eval) changed between a forward pass and its "
                "backward pass, which runs the blocks again (grad_checkpointing=true): change them afterwards"
            )
        with self.tape.replay(self.step):
            return self.block(*args, **options)

    def _first(self, *args: Any, **options: Any) -> Any:
        restore_blocks(self.model)
        if not torch.is_grad_enabled():
            raise TransferError(
                "a student that is taught cannot recompute by torch's re-entrant checkpointing, which has no gradient "
                "for the transfer loss: unset TIMM_REENTRANT_CKPT"
            )
        self.state = _state(self.block)
        return self.block(*args, **options)


def replay_blocks(model: nn.Module, tape: Tape) -> None:
    """Where the coming forward pass of `model` is checkpointed, let its backward pass read what is now on the tape."""
    recomputes = bool(getattr(model, "grad_checkpointing", False)) and torch.is_grad_enabled()
    if recomputes and not torch.compiler.is_compiling():  # a compiled step has its inputs in its graph
        assert tape.step is not None
        blocks = [ReplayedBlock(block, model, tape, tape.step) for block in attention_blocks(model)]
        object.__setattr__(model, "blocks", blocks)  # before the module of that name, which stays where it is


def restore_blocks(model: nn.Module) -> None:
    """Let `model.blocks` be the model's blocks again."""
    model.__dict__.pop("blocks", None)


def _state(block: nn.Module) -> _State:
    """What a block computes with that may change: its mode, modules, hooks, and the versions of its parameters."""
    modules = list(block.modules())
    parts = [(id(module), *module._forward_hooks) for module in modules]
    if isinstance(block, FSDPModule):  # gathers its parameters in between
        return block.training, parts, []
    return block.training, parts, [(id(parameter), parameter._version) for parameter in block.parameters()]
