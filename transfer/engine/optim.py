"""Learning rate, schedule, optimizer, its parameter groups, freezing, and the moving average of the weights."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ...models.errors import ConfigError, JsonDict, counted, did_you_mean, one_sentence
from ...models.families import classifier_of
from ...models.lora import DOWN, UP
from ..config import OptimConfig, ScheduleKind
from .parallel import local

# Exponential moving average of the student's weights.


class WeightAverage:
    """avg <- decay * avg + (1 - decay) * weight after each optimizer step, only for the student.

    It holds tensors by name instead of a second module, so it contains nothing of the teacher, and the average of a
    sharded student is sharded in the same way. timm's ModelEmaV3 copies the module with everything it refers to.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # Hold the parameters themselves: the memory of a sharded one may move, and a detached tensor would miss it.
        state = model.state_dict(keep_vars=True)
        self._weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        torch._foreach_lerp_(_locals(self.average), _locals(self._weights), 1 - self.decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Load the average into the model inside the block; then restore its own weights, bit for bit."""
        own = [tensor.clone() for tensor in _locals(self._weights)]
        torch._foreach_copy_(_locals(self._weights), _locals(self.average))
        try:
            yield
        finally:
            torch._foreach_copy_(_locals(self._weights), own)

    def predictor(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `predict` of the model, run with the average."""

        def averaged(images: Tensor) -> Tensor:
            with self.applied():
                return predict(images)

        return averaged


def _locals(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors.values()]


logger = logging.getLogger(__name__)


def peak_learning_rate(config: OptimConfig, batch_size: int, world_size: int) -> tuple[float, int]:
    """Return (lr, effective batch): lr = blr x effective batch / 256, effective = batch x accum_iter x processes.

    `config.lr`, if given, is used unchanged.
    """
    effective = batch_size * config.accum_iter * world_size
    return (config.blr * effective / 256 if config.lr is None else config.lr), effective


def describe_batch(config: OptimConfig, batch_size: int, world_size: int, images: int) -> str:
    """Describe how far the effective batch is from the recipe's, and how to reach it; empty if they are equal.

    A data set of too few images fills `images` of the effective batch only.
    """
    rate, effective = peak_learning_rate(config, batch_size, world_size)
    if config.lr is not None:
        effective = images
    if images < effective:
        return (
            f"the data set has too few images for a step of {effective:,}, so a step has {images:,}, at the learning "
            f"rate for {effective:,} ({rate:g}): lower --batch_size or --accum_iter"
        )
    recipe = config.recipe_batch
    if recipe is None or recipe == effective:
        return ""
    one = batch_size * world_size
    accum, rest = divmod(recipe, one)
    keep = (
        f"--accum_iter {accum}"
        if accum and not rest
        else f"--batch_size and --accum_iter whose product over {counted(world_size, 'process')} is {recipe:,}"
    )
    if config.lr is None:
        published = f"{config.blr * recipe / 256:g}"
        return (
            f"a step has {effective:,} images, and the recipe's {recipe:,}: the learning rate is {rate:g}, and the "
            f"recipe's {published}; {keep} keeps both"
        )
    return f"a step has {effective:,} images, and the recipe's {recipe:,}, for its learning rate; {keep} keeps it"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group to `rate` times its layer's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def freeze(model: nn.Module, trainable: str, *, keep_head: bool = True) -> None:
    """Freeze the parameters of `model` whose names do not match the regular expression, except the head's.

    Raises ConfigError: the expression is invalid or matches nothing.
    """
    pattern = _pattern("optim.trainable", trainable)
    names = [name for name, _ in model.named_parameters()]
    if not any(pattern.search(name) for name in names):
        shown = ", ".join(names[:3] + names[-2:])
        raise ConfigError(
            f"optim.trainable={trainable!r} matches no parameter of the student (some are {shown})"
        )
    head = {id(parameter) for parameter in _head_parameters(model)} if keep_head else set()
    for name, parameter in model.named_parameters():
        if not pattern.search(name) and id(parameter) not in head:
            parameter.requires_grad_(False)


def freeze_head(model: nn.Module) -> None:
    """Freeze the classifier, for a loss that does not use it."""
    for parameter in _head_parameters(model):
        parameter.requires_grad_(False)


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    head = classifier_of(model)
    return [] if head is None else list(head.parameters())


def check_optimizer(config: OptimConfig) -> None:
    """Raise ConfigError if timm has no such optimizer, or it cannot be used with these settings."""
    valid = [str(name) for name in list_optimizers()]
    if config.opt not in valid:
        raise ConfigError(
            f"optim.opt={config.opt!r} is not a timm optimizer: {did_you_mean(config.opt, valid)}"
        )
    if get_optimizer_info(config.opt).second_order:
        raise ConfigError(
            f"optim.opt={config.opt!r} needs second derivatives, which a step does not compute: use another, such as "
            "adamw"
        )
    if config.opt.startswith("kron"):
        raise ConfigError(
            f"optim.opt={config.opt!r} keeps lists of matrices, which the state of a run cannot hold: use another, "
            "such as adamw"
        )
    _betas(config)


def check_adapters(model: nn.Module, config: OptimConfig) -> None:
    """Raise ConfigError for adapters of which none learns."""
    learns = any(p.requires_grad for name, p in model.named_parameters() if name.endswith((DOWN, UP)))
    if config.lora is not None and not learns:
        raise ConfigError(
            f"optim.lora={config.lora} changes nothing with optim.trainable={config.trainable!r}, which leaves its "
            "adapters out: leave one of them out, or let optim.trainable match lora_"
        )


def create_optimizer(
    task: nn.Module, model: nn.Module, config: OptimConfig, peak: float
) -> torch.optim.Optimizer:
    """Create timm's optimizer of `model` with layer decay, and of other trainable parameters in `task` at scale 1.

    The layer scales are timm's, `layer_decay ** (depth + 1 - layer)` with the embeddings as layer 0, block i
    as layer i + 1 and the head as layer depth + 1. They equal MAE's for a model with average pooling. They
    differ for a final `norm` before a token head: timm gives it the last block's scale, MAE the head's 1.
    """
    check_optimizer(config)
    find_exempt: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    exempt = find_exempt()
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(model, config.weight_decay, exempt, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    own = {id(parameter) for parameter in model.parameters()}
    extra = [p for p in task.parameters() if p.requires_grad and id(p) not in own]
    if extra:
        groups.append({"params": extra, "weight_decay": config.weight_decay})
    groups = _scaled(groups, model, config.scales)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=config.opt, lr=peak, weight_decay=config.weight_decay, **_betas(config)
        )
    except (
        ImportError,
        AssertionError,
        RuntimeError,
        ValueError,
    ) as error:  # from optimizers that need another device or package, or other values
        raise ConfigError(
            f"optim.opt={config.opt!r} cannot be used here: {one_sentence(str(error))}"
        ) from error
    return optimizer


def _scaled(groups: list[JsonDict], model: nn.Module, scales: Mapping[str, float]) -> list[JsonDict]:
    """Split the groups so that each has one factor of the rate: the product of those whose expression matches."""
    patterns = {_pattern("optim.scales", text): scale for text, scale in scales.items()}
    factors = {
        id(parameter): math.prod(scale for pattern, scale in patterns.items() if pattern.search(name))
        for name, parameter in model.named_parameters()
    }
    for pattern in patterns:
        if not any(pattern.search(name) for name, each in model.named_parameters() if each.requires_grad):
            logger.warning("optim.scales: %r matches the name of no parameter that learns", pattern.pattern)
    split = []
    for group in groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in by_factor.items():
            rate = {} if factor == 1 else {"lr_scale": group.get("lr_scale", 1.0) * factor}
            split.append({**group, "params": parameters, **rate})
    return split


def _pattern(setting: str, text: str) -> re.Pattern[str]:
    """Compile a regular expression. Raises ConfigError that names the setting."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{setting}={text!r} is not a regular expression: {error}") from error


def _betas(config: OptimConfig) -> JsonDict:
    """Return the betas; the optimizer's own if it takes none or three and the setting has its default."""
    info = get_optimizer_info(config.opt)
    if info.has_betas and info.num_betas == len(config.betas):
        return {"betas": config.betas}
    if config.betas != OptimConfig.model_fields["betas"].default:
        takes = f"{info.num_betas} betas" if info.has_betas else "no betas"
        raise ConfigError(
            f"optim.betas={config.betas} does not fit optim.opt={config.opt!r}, which takes {takes}"
        )
    return {}


@dataclass(frozen=True)
class Schedule:
    """The schedule in optimizer steps of `accum` batches. An epoch's remaining batches are not used.

    The rate is a pure function of the step, so that a restart has nothing to restore.
    """

    accum: int
    steps_per_epoch: int
    total_steps: int
    peak: float
    minimum: float
    warmup_steps: float
    effective_batch: int
    kind: ScheduleKind = "cosine"
    milestones: tuple[float, ...] = ()
    """In steps."""
    power: float = 0.9

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0: linear from zero to `peak` in the warm-up, then

        - cosine: minimum + (peak - minimum) (1 + cos(pi (step - warmup) / (total - warmup))) / 2, as in MAE;
        - steps: peak / 10^n after n milestones, at least `minimum`, as in Faster R-CNN;
        - poly: minimum + (peak - minimum) (1 - step / total)^power, as in DeepLab (arXiv:1606.00915).
        """
        peak, minimum, warmup, total = self.peak, self.minimum, self.warmup_steps, self.total_steps
        if step < warmup:
            return peak * step / warmup
        if self.kind == "steps":
            return max(minimum, peak * 0.1 ** sum(step >= each for each in self.milestones))
        if self.kind == "poly":
            return minimum + (peak - minimum) * math.pow(max(0.0, 1 - step / total), self.power)
        progress = (step - warmup) / max(1.0, total - warmup)
        return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


WARMUP = 5
"""Epochs of a warm-up whose length is not given; a tenth of a run that is shorter than ten times as long."""


def warmup_steps(config: OptimConfig, steps_per_epoch: int, total_steps: int) -> float:
    """Return the steps of the warm-up: those of `optim.warmup_epochs`, or else min(5 epochs, a tenth of the run).

    A tenth is the share in MAE's fine-tuning, which warms up for 5 of 50 epochs (arXiv:2111.06377, table 9). With
    `optim.max_steps`, a given warm-up as long as the run is a tenth of it, too. A run of one step has none, which would
    leave it at rate zero.
    """
    given, tenth = config.warmup_epochs, total_steps / 10
    if config.warmup_steps is not None and given is None:
        return config.warmup_steps if config.warmup_steps < total_steps else tenth
    if total_steps == 1:
        return 0.0
    if given is None:
        return min(WARMUP * steps_per_epoch, tenth)
    return given * steps_per_epoch if given * steps_per_epoch < total_steps else tenth


def plan_schedule(config: OptimConfig, batches_per_epoch: int, batch_size: int, world_size: int) -> Schedule:
    """Return the schedule of a run whose loader gives `batches_per_epoch` batches to each process."""
    accum = min(config.accum_iter, batches_per_epoch)
    steps_per_epoch = batches_per_epoch // accum
    peak, effective = peak_learning_rate(config, batch_size, world_size)
    if peak < config.min_lr:
        origin = f"optim.blr x {effective:,} images / 256" if config.lr is None else "optim.lr"
        raise ConfigError(
            f"optim.min_lr={config.min_lr:g} is above the peak of the learning rate, {peak:g} ({origin}), so the rate "
            "would be constant: lower min_lr, or raise the rate or the number of images per step (--accum_iter)"
        )
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    return Schedule(
        accum=accum,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        peak=peak,
        minimum=min(config.min_lr, peak),
        warmup_steps=warmup_steps(config, steps_per_epoch, total_steps),
        effective_batch=effective,
        kind=config.schedule,
        milestones=tuple(each * steps_per_epoch for each in config.milestones),
        power=config.power,
    )
