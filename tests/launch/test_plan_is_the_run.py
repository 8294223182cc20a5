"""The dry run refuses what the run refuses, in the same sentence, and states what the run then does.

Each case is a random configuration, from a seed. GRAFTVIT_FUZZ says how many.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.launch.plan_text import describe_plan, memory_items
from graftvit.models.errors import GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.loop import Batch, Loop
from graftvit.transfer.engine.modes import MODES
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.method_facts import facts_of, method_names
from graftvit.transfer.setting import find_unread, without
from support.runs.engine_runs import config, make_convnext, make_teacher, records
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytestmark = pytest.mark.usefixtures("few_digits")

CASES = int(os.environ.get("GRAFTVIT_FUZZ") or 40)
OPTIMIZERS = (
    "adamw", "sgd", "lamb", "adafactor", "lion", "adam", "lookahead_adam", "adahessian", "fusedadam", "nosuch",
)  # fmt: skip
PLANS = (
    "*: linear", "0: nystrom(landmarks=2)", "*: performer", "1: linformer", "*: ttt", "*: hash(anchors=2, bits=2)",
    "*: nosuch", "5: linear",
)  # fmt: skip
STUDENTS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 24}, {"num_heads": 4}, {"depth": 3}, {"depth": 1}, {"patch_size": 2}, {"class_token": False},
    {"reg_tokens": 2}, {"qk_norm": True, "init_values": 0.1}, {"dynamic_img_size": True}, {"attn_drop_rate": 0.1},
    {"patch_drop_rate": 0.5}, {"no_such_argument": 1}, {"num_heads": 5}, {"img_size": 9},
)  # fmt: skip


def sometimes(draw: random.Random, share: float, *values: Any) -> dict[str, Any]:
    """A name and one of its values in a share of the cases, else nothing."""
    name, *choices = values
    return {name: draw.choice(choices)} if draw.random() < share else {}


def loss(draw: random.Random) -> dict[str, Any]:
    """A method and, mostly, settings that it reads."""
    method = draw.choice(method_names())
    settings = {
        **sometimes(
            draw, 0.4, "layers", "first:1", "last:2", "every:2", "0", "1>0,0>1", "-1", ":1", "9", "x"
        ),
        **sometimes(draw, 0.3, "heads", "mean", "match", "0", "1>0", "7", "x"),
        **sometimes(draw, 0.3, "loss", "kl"),
        **sometimes(draw, 0.3, "feature_loss", "smooth_l1"),
        **sometimes(draw, 0.3, "logits_loss", "hard"),
        **sometimes(draw, 0.1, "logits_head", "distillation"),
        **sometimes(draw, 0.3, "weight", 0.5, 3.0),
        **sometimes(draw, 0.2, "reduction", "mean"),
        **sometimes(draw, 0.2, "temperature", 2.0),
        **sometimes(draw, 0.2, "rows", 0.5),
        **sometimes(draw, 0.1, "interpolate_grid", True),
    }
    reads = facts_of(method).reads or ()
    kept = {name: value for name, value in settings.items() if name in reads or draw.random() < 0.03}
    return {"method": method, **kept}


def several(draw: random.Random, transfer: dict[str, Any], teachers: list[Path]) -> dict[str, Any]:
    """The sections of a run with several losses, and often with further teachers."""
    names = draw.sample(("other", "convnext"), draw.choice((0, 1, 1, 2)))
    sources = {"other": teachers[0], "convnext": teachers[-1]}
    wrong = ["nosuch"] if not names or draw.random() < 0.1 else []
    entries = [
        {**loss(draw), **sometimes(draw, 0.5, "teacher", *names, *wrong)}
        for _ in range(draw.choice((1, 2, 2, 3)))
    ]
    shared = {name: transfer[name] for name in ("task_weight", "share_drop_path") if name in transfer}
    return {
        "teachers": {name: {"source": f"local-dir:{sources[name]}"} for name in names},
        "transfer": {**shared, "losses": entries},
    }


def random_config(draw: random.Random, folder: Path, teachers: list[Path]) -> RunConfig:
    teacher = draw.choice([*teachers, *teachers[:1] * 3, None])
    arguments = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    arguments |= draw.choice(STUDENTS) if draw.random() < 0.35 else {}
    student = {
        "model_args": arguments,
        "drop_path": draw.choice((0.0, 0.2)),
        **sometimes(draw, 0.2, "plan", *PLANS),
        **sometimes(
            draw,
            0.2,
            "init",
            "teacher",
            f"local-dir:{teachers[0]}",
            f"local-dir:{teachers[1]}",
            "/nowhere.pth",
        ),
        **sometimes(draw, 0.2, "global_pool", "avg", "token", "map", ""),
        **sometimes(draw, 0.1, "pos_embed_std", 0.02),
        **sometimes(draw, 0.1, "mirror_teacher", True),
        **sometimes(draw, 0.2, "grad_checkpointing", True),
        **sometimes(draw, 0.05, "img_size", 8, 16, 10),
    }
    transfer = loss(draw) | {
        **sometimes(draw, 0.2, "task_weight", 0.0, 0.5),
        **sometimes(draw, 0.1, "share_drop_path", True),
    }
    data = {
        "batch_size": draw.choice((4, 7, 16)), "train_samples": 48, "mixup": draw.choice((0.0, 0.2)),
        **sometimes(draw, 0.1, "val_split", None, "foo"), **sometimes(draw, 0.05, "train_split", "foo"),
        **sometimes(draw, 0.05, "train_samples", 2, 9999), **sometimes(draw, 0.05, "num_classes", 10, 3),
        **sometimes(draw, 0.05, "aa", "affine", "nosuch"), **sometimes(draw, 0.03, "dataset", "nosuch"),
    }  # fmt: skip
    optim = {
        "max_steps": 1, "ema": draw.choice((None, 0.9)), "clip_grad": draw.choice((None, 1.0)),
        **sometimes(draw, 0.4, "opt", *OPTIMIZERS), **sometimes(draw, 0.3, "accum_iter", 2, 3),
        **sometimes(draw, 0.2, "layer_decay", 0.7), **sometimes(draw, 0.2, "lora", 2),
        **sometimes(draw, 0.3, "trainable", r"blocks\.1", "attn", "head", "nosuch", "(", "q_norm"),
        **sometimes(draw, 0.2, "scales", {"attn": 5.0}, {"(": 2.0}), **sometimes(draw, 0.2, "lr", 1e-4),
        **sometimes(draw, 0.05, "betas", (0.8, 0.9)),
    }  # fmt: skip
    engine = {
        "log_interval": 1, **sometimes(draw, 0.2, "precision", "bf16", "bf16", "fp16"),
        **sometimes(draw, 0.04, "fsdp", True), **sometimes(draw, 0.04, "trackers", ("wandb",)),
        **sometimes(draw, 0.2, "metric", "top1", "knn", "probe", "distance", "loss"),
        "evaluate_teacher": draw.random() < 0.2,
    }  # fmt: skip
    mode = draw.choice([*MODES, "transfer", "transfer", "transfer", "align"])
    losses = several(draw, transfer, teachers) if draw.random() < 0.4 else {"transfer": transfer}
    if mode == "transfer" and draw.random() < 0.2:
        keep_targets(draw, folder, losses["transfer"], data)
    found = config(
        folder,
        teacher,
        mode=mode,
        student=student,
        **losses,
        align=sometimes(draw, 0.5, "match", "map", "probes", "rows"),
        data=data,
        optim=optim,
        engine=engine,
        pretrain=sometimes(draw, 0.2, "decoder_heads", 3),
    )
    return without(found, (key for key in find_unread(found) if draw.random() < 0.97))


def keep_targets(draw: random.Random, folder: Path, transfer: dict[str, Any], data: dict[str, Any]) -> None:
    """Add a cache of teacher targets and, mostly, what it needs."""
    transfer |= {"cache": str(folder.parent / "targets"), **sometimes(draw, 0.2, "cache_limit", 1e-6, 1.0)}
    transfer |= sometimes(draw, 0.4, "cache_type", "bf16", "int8") | sometimes(draw, 0.2, "cache_pool", 2)
    transfer |= sometimes(draw, 0.2, "cache_top", 3, 10)
    data |= {"views": draw.choice((0, 1, 2, 2, None)), "mixup": draw.choice((0.0, 0.0, 0.2))}
    if draw.random() < 0.8 and not transfer.get("losses"):
        kept = {
            name: value
            for name, value in transfer.items()
            if name.startswith("cache") or name == "task_weight"
        }
        transfer.clear()
        transfer |= {
            **kept,
            "method": draw.choice(("logits", "feature")),
            **sometimes(draw, 0.4, "tokens", "both"),
        }


def refusal(start: Any, settings: RunConfig) -> str:
    """The sentence with which something is refused; empty where it is not."""
    try:
        start(settings)
    except GraftError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def size(tensors: Any) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextmanager
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What the first step of a run inside keeps in memory, by the name of the plan's item."""
    found: dict[str, int] = {}
    tasks: list[nn.Module] = []
    backward = Loop._backward

    def watched(loop: Loop, batch: Batch, index: int) -> None:
        task = loop.parts.task
        teacher = [each.model for each in loop.parts.teachers.values()]
        known = {
            t.untyped_storage().data_ptr() for m in (task, *teacher) for t in [*m.parameters(), *m.buffers()]
        }
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backward(loop, batch, index)
        found.setdefault("activations", size(kept))
        tasks[:] = [task]
        found["student"] = size([*task.parameters(), *task.buffers()])
        if len(batch) == 2:  # not taught before
            found["teacher"] = size(t for m in teacher for t in [*m.parameters(), *m.buffers()])

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = (p.grad for p in tasks[0].parameters() if p.grad is not None)
        found.setdefault("gradients", size(grads))  # a linear probe has steps of its own, later

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        slots = [value for state in optimizer.state.values() for value in state.values()]
        found.setdefault("optimizer", size(slot for slot in slots if isinstance(slot, Tensor)))

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_backward", watched)
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return [
        make_teacher(folder / "classes"),
        make_teacher(folder / "headless", 0),
        make_teacher(folder / "three", 3),
        make_convnext(folder / "convnext"),
    ]


@pytest.mark.parametrize("seed", range(CASES))
def test_the_dry_run_is_the_run(
    seed: int, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = random_config(random.Random(seed), tmp_path / "run", teachers)
    planned = refusal(describe_plan, settings)
    assert not (tmp_path / "run").exists()
    with measured(monkeypatch) as found:
        assert refusal(train, settings) == planned
    if planned:
        return
    monkeypatch.setattr("graftvit.transfer.engine.dry_run.refuse_existing", lambda *_: None)
    run = dry_run(settings.model_copy(update={"output_dir": tmp_path / "again"}), 1, here=True)
    plan, log = (
        describe_plan(settings.model_copy(update={"output_dir": tmp_path / "again"})),
        records(tmp_path / "run"),
    )
    last = next(record for record in log if "n_parameters" in record)
    assert f"{last['n_parameters']:,} of " in plan
    layers = {key for key in last if re.fullmatch(r"train_(.*\.)?layer\d+", key)}
    dual = getattr(run.parts.task, "dual", None)
    if dual is not None:
        taught = [term for term in dual.terms if not term.method.copies]
        assert layers == {f"train_{term.loss_name(link)}" for term in taught for link in term.plan.links}
    assert run.schedule is not None
    assert last["lr"] == run.schedule.rate(0)
    expected = {item.name: item.size for item in memory_items(run)}
    for name, measured_size in found.items():
        exact = name != "activations"
        assert expected.get(name, 0) == pytest.approx(measured_size, rel=0 if exact else 0.05), name
