"""Random pairs through random sequences of calls, against the dense reference: right, or refused.

`GRAFTVIT_FUZZ=2000 pytest tests/fuzz/test_sequences.py` runs that many sequences, others each time.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from graftvit.models.errors import DataError, TransferError
from graftvit.transfer.methods.dual import DualViT
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from support.models.dense import images, relative_error, tiny
from support.models.pair_cases import Case, cases
from support.models.pair_reference import expected
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

COUNT = int(os.environ.get("GRAFTVIT_FUZZ") or 0)
TOLERANCE = 1e-9
FLOAT32 = 1e-6  # timm resamples position embeddings in it
CALLS = [
    "forward", "forward", "forward", "forward under autocast", "forward without gradient", "backward", "backward",
    "backward of all", "backward twice", "predict", "predict with gradient", "the student alone", "eval", "train",
    "checkpointing", "no checkpointing", "a step of the weights", "load_state_dict", "release", "wrap again",
    "deepcopy", "pickle", "with_student", "an image that fails", "a second wrapper",
]  # fmt: skip


def fail(*_: object) -> None:
    """Stand in for a pass that ends in its middle, as without memory."""
    raise RuntimeError("fails")


@dataclass(eq=False)
class World:
    """A wrapper, a plain twin of its student, and what the reference says of the gradients."""

    dual: DualViT
    twin: nn.Module
    projectors: nn.ModuleDict
    call: Callable[[Tensor], Any]
    taught: bool = True
    changes: int = 0
    gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget_gradients()

    @property
    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Ours and the reference's, in one order."""
        ours, theirs = dict(self.dual.student.named_parameters()), dict(self.twin.named_parameters())
        assert list(ours) == list(theirs)
        extra = list(self.dual.projectors.parameters()), list(self.projectors.parameters())
        return [*ours.values(), *extra[0]], [*theirs.values(), *extra[1]]

    def forget_gradients(self) -> None:
        self.dual.zero_grad()
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters[1]]


@dataclass
class Pending:
    """A loss that waits for its backward pass, and the gradients that it must give."""

    world: World
    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    changes: int


class Session:
    """The calls of one sequence; each checks what it gives."""

    def __init__(self, case: Case, compiled: bool) -> None:
        self.case, self.compiled = case, compiled
        self.teacher, student = case.models()
        self.plain_teacher = copy.deepcopy(self.teacher)
        self.worlds = [self.world(DualViT(self.teacher, student, *self.settings[0], **self.settings[1]))]
        self.pending: list[Pending] = []

    @property
    def settings(self) -> tuple[tuple[str], dict[str, Any]]:
        pair = self.case.pair
        return (pair.method,), {**pair.options, **self.case.norms()}

    def world(self, dual: DualViT) -> World:
        twin = tiny(seed=2, **self.case.student)
        twin.load_state_dict(dual.student.state_dict())
        twin.train(dual.student.training)
        call = torch.compile(dual, backend="eager", dynamic=False) if self.compiled else dual
        return World(dual, twin, copy.deepcopy(dual.projectors), call)

    def run(self, name: str, world: World, number: int) -> None:
        sizes = self.case.sizes
        x = images(batch=1 + number % 2, seed=number, size=sizes[number % len(sizes)])
        if name.startswith("forward"):
            self.forward(world, x, name)
        elif name.startswith("backward"):
            self.backward(name, number)
        elif name in ("predict", "predict with gradient", "the student alone"):
            self.predict(world, x, name)
        elif name in ("eval", "train"):
            world.changes += world.dual.student.training != (name == "train")
            getattr(world.dual, name)()
            world.twin.train(name == "train")
        elif name.endswith("checkpointing"):
            if self.compiled and not self.case.pair.method.startswith("copy"):
                return  # torch refuses to compile blocks that give a loss and are run again
            world.dual.student.set_grad_checkpointing(not name.startswith("no"))
        elif name in ("a step of the weights", "load_state_dict"):
            self.change(world, name, number)
        elif name == "release":
            world.changes += 1
            world.dual.release(bare=world.dual.needs_teacher)
            world.taught = False
        elif name == "an image that fails":
            with pytest.raises((DataError, TransferError)):
                world.dual(x[:, :2])
            fails = world.dual.student.get_submodule("norm").register_forward_pre_hook(fail)
            with pytest.raises((RuntimeError, TransferError)):
                world.dual(x)
            fails.remove()
        elif name == "a second wrapper":
            self.second(world)
        elif len(self.worlds) < 4:
            self.another(name, world)

    def forward(self, world: World, x: Tensor, name: str) -> None:
        if not world.taught:
            with pytest.raises(TransferError, match="was released"):
                world.dual(x)
            return
        with (
            torch.set_grad_enabled("without" not in name),
            torch.autocast("cpu", torch.bfloat16, enabled="autocast" in name),  # leaves float64 as it is
        ):
            out = world.call(x)
        logits, loss = expected(self.case.pair, self.plain_teacher, world.twin, x, world.projectors)
        assert relative_error(out.logits, logits) < TOLERANCE
        assert abs(float(out.transfer_loss.detach() - loss.detach())) < TOLERANCE * max(
            1.0, float(loss.detach())
        )
        if out.logits.requires_grad:
            self.wait(world, out.logits.square().mean() + out.transfer_loss, logits.square().mean() + loss)

    def predict(self, world: World, x: Tensor, name: str) -> None:
        dual = world.dual
        if dual.needs_teacher and not world.taught and name != "the student alone":
            with pytest.raises(TransferError, match="was released"):
                dual.predict(x)
            return
        with torch.set_grad_enabled(name != "predict"):
            logits = dual.student(x) if name == "the student alone" else dual.predict(x)
        if dual.needs_teacher and name != "the student alone":
            wanted, _ = expected(self.case.pair, self.plain_teacher, world.twin, x, world.projectors)
        else:
            wanted = world.twin(x)
        assert relative_error(logits, wanted) < TOLERANCE
        if logits.requires_grad:
            self.wait(world, logits.square().mean(), wanted.square().mean())

    def wait(self, world: World, loss: Tensor, reference: Tensor) -> None:
        gradients = torch.autograd.grad(reference, world.parameters[1], allow_unused=True)
        trained = [parameter.requires_grad for parameter in world.parameters[0]]  # some are frozen for DDP
        gradients = tuple(grad if wanted else None for grad, wanted in zip(gradients, trained, strict=True))
        self.pending.append(Pending(world, loss, gradients, world.changes))

    def backward(self, name: str, number: int) -> None:
        if not self.pending:
            return
        chosen = self.pending[:] if "all" in name else [self.pending[number % len(self.pending)]]
        self.pending = [each for each in self.pending if not any(each is one for one in chosen)]
        times = 2 if "twice" in name else 1
        try:
            total = torch.stack([each.loss for each in chosen]).sum()
            for time in range(times):
                total.backward(retain_graph=time + 1 < times)
        except (TransferError, CheckpointError, RuntimeError) as error:
            in_place = "inplace operation" in str(error)
            changed = any(each.changes != each.world.changes for each in chosen)
            if not changed or not (in_place or isinstance(error, TransferError | CheckpointError)):
                raise
            event("a backward pass was refused")
            for each in chosen:
                each.world.forget_gradients()
            return
        for each in chosen:
            ours, _ = each.world.parameters
            for known, new, parameter in zip(each.world.gradients, each.gradients, ours, strict=True):
                if new is not None and parameter.requires_grad:  # a wrapper may have frozen it since
                    known += times * new
        for each in chosen:
            self.compare(each.world)

    def compare(self, world: World) -> None:
        ours = [torch.zeros_like(p) if p.grad is None else p.grad for p in world.parameters[0]]
        vectors = [torch.cat([grad.flatten() for grad in grads]) for grads in (ours, world.gradients)]
        assert relative_error(*vectors) < (TOLERANCE if len(self.case.sizes) == 1 else FLOAT32)

    def change(self, world: World, name: str, number: int) -> None:
        world.changes += 1
        if name == "load_state_dict":
            other = tiny(seed=3 + number, **self.case.student).state_dict()
            world.dual.student.load_state_dict(other)
        else:
            with torch.no_grad():
                for parameter in world.dual.student.parameters():
                    parameter.mul_(0.9)
        world.twin.load_state_dict(world.dual.student.state_dict())

    def second(self, world: World) -> None:
        if world.taught:
            with pytest.raises(TransferError, match="another DualViT"):
                DualViT(self.teacher, world.dual.student)
        with pytest.raises(TransferError, match="share their weights"):
            DualViT(world.dual.student, world.dual.student)

    def another(self, name: str, world: World) -> None:
        if name == "wrap again":
            if world.taught:
                return
            dual = DualViT(self.teacher, world.dual.student, *self.settings[0], **self.settings[1])
            self.worlds.remove(world)
        elif name == "with_student":
            if not world.taught:
                return
            dual = world.dual.with_student(copy.deepcopy(world.dual.student))
        else:
            dual = pickle.loads(pickle.dumps(world.dual)) if name == "pickle" else copy.deepcopy(world.dual)
        made = self.world(dual)
        made.taught = world.taught or name == "wrap again"
        made.forget_gradients()  # which stay behind where parameters are copied
        if name == "wrap again":  # what waits is of the same student, with projectors of its own
            self.pending = [each for each in self.pending if each.world is not world or not world.projectors]
            for each in self.pending:
                if each.world is world:
                    each.world, each.changes = made, -1
        self.worlds.append(made)


@pytest.mark.slow
@settings(
    max_examples=COUNT or 30,
    derandomize=not COUNT,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a sequence is short, and shrinking one takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    case=cases(),
    calls=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 5)), min_size=4, max_size=14),
    rare=st.integers(0, 31),
)
def test_a_sequence_of_calls_is_right_or_refused(case: Case, calls: list[tuple[str, int]], rare: int) -> None:
    torch.compiler.reset()
    session = Session(case, compiled=rare == 0)
    for name, number in [*calls, ("forward", 0), ("backward of all", 0)]:
        note(f"{name} {number}")
        session.run(name, session.worlds[number % len(session.worlds)], number)
