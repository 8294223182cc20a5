"""The best mix of attention operators under a budget: which operator each layer of a teacher gets.

Every replacement of one layer l by an operator o has an error e(l, o) at the teacher's end and a cost c(l, o) in the
whole model, as a share of the teacher's. With x(l, o) = 1 where layer l has operator o,

    minimize Σ x(l, o) e(l, o)   subject to   Σ_o x(l, o) = 1 for each l,   1 + Σ x(l, o) c(l, o) ≤ budget

is a multiple-choice knapsack, which HiGHS solves exactly. A sum is a model of the first order: the hybrids that it
chooses are built and measured, both sums are corrected by what was measured, and chosen again until the choice is one
that was measured. Nothing is trained here, and no label is read.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from ..checkpoints.files import append_line, digest, open_lines, read_records
from ..models.conversion import ConvertedAttention, convert, converted_layers, resize
from ..models.cost import count_operations
from ..models.errors import ConfigError, TransferError
from ..models.families import classifier_of, family_of, image_channels, image_size, sites
from .align import check_alike
from .analysis.benchmark_cases import Prices, Step, machine, peak_bytes, step_of, time_steps
from .metrics.measure import evaluate

KEEP = "keep"
"""The teacher's own attention."""
Mix = tuple[str, ...]
"""The operator of each layer, by the name of the student that it comes from, or `KEEP`."""
Measure = Literal["latency", "macs", "energy", "memory", "keep"]


# The choice.


@dataclass(frozen=True)
class Sum:
    """A number of a mix as a sum over its layers: start + Σ_l parts(l, operator of l)."""

    start: float
    parts: Mapping[tuple[int, str], float]

    def of(self, mix: Mix) -> float:
        """Return the number that the sum gives for a mix."""
        return self.start + sum(self.parts.get(pair, 0.0) for pair in enumerate(mix))

    def corrected(self, measured: Mapping[Mix, float]) -> Sum:
        """Return the sum that is nearest to this one among those that agree with what was measured.

        The change of each part is counted in its own size, and what a mix is off by in what was measured of it.
        """
        pairs = [pair for pair, part in self.parts.items() if part]
        mixes = [mix for mix in measured if abs(measured[mix] - self.start) > 0]
        if not pairs or not mixes:
            return self
        size = np.array([abs(self.parts[pair]) for pair in pairs])
        scale = np.array([abs(measured[mix] - self.start) for mix in mixes])
        has = np.array([[mix[layer] == operator for layer, operator in pairs] for mix in mixes])
        left = np.array([measured[mix] - self.of(mix) for mix in mixes])
        rows = has * size / scale[:, None]
        change = rows.T @ np.linalg.solve(rows @ rows.T + RIDGE * np.eye(len(mixes)), left / scale)
        moved = {pair: self.parts[pair] + float(by) for pair, by in zip(pairs, size * change, strict=True)}
        return Sum(self.start, {**self.parts, **moved})


RIDGE = 1e-3
"""How much a sum may miss what was measured, so that noise does not move its parts far."""


def choose(error: Sum, cost: Sum, limit: float, depth: int, excluded: Collection[Mix] = ()) -> Mix | None:
    """Return the mix of the least `error` whose `cost` is at most `limit`; None without one.

    The operators of a layer are those that `error` has a part of. `excluded` are mixes that it must not be.
    """
    pairs = [(layer, KEEP) for layer in range(depth)] + list(error.parts)
    errors = np.array([error.parts.get(pair, 0.0) for pair in pairs])
    costs = np.array([cost.parts.get(pair, 0.0) for pair in pairs])
    of_layer = np.array([[pair[0] == layer for pair in pairs] for layer in range(depth)], dtype=float)
    constraints = [
        LinearConstraint(of_layer, 1, 1),
        LinearConstraint(costs[None], -np.inf, limit - cost.start),
        *(
            LinearConstraint(
                np.array([[mix[layer] == name for layer, name in pairs]], dtype=float), 0, depth - 1
            )
            for mix in excluded
        ),
    ]
    largest = max(np.abs(errors).max(), 1e-30)  # or HiGHS takes small errors for zero
    found = milp(
        errors / largest,
        constraints=constraints,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    chosen = dict(pair for pair, share in zip(pairs, found.x, strict=True) if share > 0.5)
    return tuple(chosen[layer] for layer in range(depth))


# The models.


class Palette:
    """A teacher and its aligned students, of which mixes are made.

    Args:
        teacher: the model that all students were converted from.
        students: by name, each a conversion of the teacher whose layers were aligned.
        digests: of the students' weights, by name: the error of a mix is that of these weights.

    Raises:
        TransferError: a student converts no layer, or was not converted from this teacher.
    """

    def __init__(
        self, teacher: nn.Module, students: Mapping[str, nn.Module], digests: Mapping[str, str] | None = None
    ) -> None:
        self.digests = digests or {}
        self.teacher = teacher.eval().requires_grad_(False)
        self.layers = {name: converted_layers(student) for name, student in students.items()}
        for name, student in students.items():
            if not self.layers[name]:
                raise TransferError(f"{name} converts no layer: give operators")
            check_alike(teacher, student, self.layers[name])
        self.depth = len(sites(teacher))

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """Return every layer with each operator that can take it."""
        return [(layer, name) for name, layers in self.layers.items() for layer in layers]

    @property
    def kept(self) -> Mix:
        """Return the mix that is the teacher."""
        return (KEEP,) * self.depth

    def single(self, layers: Collection[int], name: str) -> Mix:
        """Return the mix with one operator in some layers."""
        return tuple(
            name if layer in layers and layer in self.layers[name] else KEEP for layer in range(self.depth)
        )

    def groups(self) -> list[list[int]]:
        """Return the layers by the shape of their attention: a replacement costs the same in all layers of a group."""
        found: dict[object, list[int]] = {}
        for site in sites(self.teacher):
            if site.num_heads:
                found.setdefault((site.shape, site.stage), []).append(site.index)
        return list(found.values())

    def key(self, mix: Mix) -> str:
        """Return what tells a mix from all others, of other weights too."""
        return " ".join(f"{name}@{self.digests[name][:12]}" if name in self.digests else name for name in mix)

    def plan(self, mix: Mix) -> dict[int, str]:
        """Return the operator of each converted layer, on which the cost of a mix depends."""
        return {layer: self._text(self.layers[name][layer]) for layer, name in enumerate(mix) if name != KEEP}

    def _text(self, layer: ConvertedAttention) -> str:
        """Return the operator of a student's layer; with its counts if it was created for another image size."""
        here = layer.tokens.plan_size in (None, image_size(self.teacher))
        return str(layer.choice if here else layer.resolved)

    def model(self, mix: Mix) -> nn.Module:
        """Return the model of a mix: the teacher, with these layers of the students."""
        plan = self.plan(mix)
        if not plan:
            return self.teacher
        without = ("bias",) if "bias" in family_of(self.teacher).gives_up else ()
        student = convert(self.teacher, plan, without=without)
        for layer, there in converted_layers(student).items():
            there.load_state_dict(self.layers[mix[layer]][layer].state_dict())
        return student.eval().requires_grad_(False)


def end_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of classes (B, C), or the final tokens (B, N, D) without a head."""
    if isinstance(classifier_of(model), nn.Linear):
        logits: Tensor = model(images)
        return logits.double().log_softmax(
            -1
        )  # the error of a mix near the teacher is below float32's rounding
    family = family_of(model)
    return family.tokens(family.features(model, images)).float()


def end_error(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return how far a student's end is from the teacher's, batch by batch.

    Of classes KL(p_t ‖ p_s), a mean over images in nats. Of tokens the squared distance, relative to the variance of
    the teacher's.
    """
    if theirs[0].ndim == 2:
        off = sum(
            float(F.kl_div(a, b, reduction="sum", log_target=True)) for a, b in zip(own, theirs, strict=True)
        )
        return off / sum(len(each) for each in theirs)
    off = sum(float((a - b).square().sum()) for a, b in zip(own, theirs, strict=True))
    return off / sum(float((each - each.mean((0, 1))).square().sum()) for each in theirs)


# What a model costs.


@dataclass(frozen=True)
class Scale:
    """Where costs are measured."""

    size: tuple[int, int]
    batch: int = 1
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    repeats: int = 7

    def costs(self, measure: Measure, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the cost of each model: seconds, multiplications, pJ or bytes of a batch, or layers kept.

        Seconds are measured in turn, and are processor time of all threads on a CPU. Bytes are the most that a
        forward pass of training holds at once.
        """
        if measure == "latency":
            times = time_steps(
                {name: self._step(each) for name, each in models.items()}, self.repeats, self.device
            )
            return {
                name: time.cpu if self.device.type == "cpu" and time.cpu else time.median
                for name, time in times.items()
            }
        if measure == "memory":
            return {
                name: float(peak_bytes(self._learning(each), self.device)) for name, each in models.items()
            }
        if measure == "keep":
            layers = {
                name: sum(bool(site.num_heads) for site in sites(each)) for name, each in models.items()
            }
            return {name: float(layers[name] - len(converted_layers(each))) for name, each in models.items()}
        counts = {name: count_operations(each).total for name, each in models.items()}
        price = Prices().energy if measure == "energy" else (lambda each: float(each.multiplications))
        return {name: self.batch * price(count) for name, count in counts.items()}

    def _step(self, model: nn.Module) -> Step:
        return step_of(partial(model.to(self.device), self._images(image_channels(model))))

    def _learning(self, model: nn.Module) -> Step:
        """Return a forward pass that keeps what a backward pass needs: its memory is a sum over the layers."""
        images = self._images(image_channels(model)).requires_grad_()

        def learn() -> Tensor:
            with torch.enable_grad():
                out: Tensor = model.to(self.device)(images)
            return out

        return learn

    def _images(self, channels: int) -> Tensor:
        return torch.zeros(self.batch, channels, *self.size, device=self.device)


# The search, whose every number is written down as soon as it is known.


class Journal:
    """Numbers by key in a file of lines: what is there is not measured again, by whichever process."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def known(self, key: str, measure: Callable[[], float]) -> float:
        """Return what the file has under `key`, or else what `measure` gives, which is added.

        Raises ConfigError: the file has numbers of other settings.
        """
        for record in read_records(self.path, refusal=ConfigError):
            if record.get("settings") != self.settings:
                raise ConfigError(
                    f"{self.path} has numbers of another teacher: take another --output_dir, or remove it"
                )
            found = record.get("value")
            if record.get("key") == key and isinstance(found, (int, float)) and math.isfinite(found):
                return found
        value = measure()
        with open_lines(self.path) as file:
            append_line(file, json.dumps({"settings": self.settings, "key": key, "value": value}))
        return value


def _seen(batches: Sequence[Tensor]) -> str:
    """Return what tells some images from others."""
    return digest([images.double().mean((1, 2, 3)).tolist() for images in batches])


@dataclass(frozen=True)
class Budget:
    """The most that a hybrid may cost: a share of the teacher's cost, or a number of layers that are kept."""

    measure: Measure
    limit: float

    def __str__(self) -> str:
        return f"{self.measure} {self.limit:g}"


@dataclass(frozen=True)
class Hybrid:
    """A mix that was built and measured."""

    mix: Mix
    error: float
    cost: float
    predicted_error: float
    predicted_cost: float


class HybridSearch:
    """The errors and the costs of mixes of a palette, and the choice among them.

    Args:
        palette: the teacher and its aligned students.
        batches: images, normalized for the teacher.
        scale: where costs are measured.
        journal: keeps every number.
        tell: gets a line about what is measured.
        labeled: batches of validation images, normalized for the teacher, and their labels, to measure top-1 on.
    """

    def __init__(
        self,
        palette: Palette,
        batches: Sequence[Tensor],
        scale: Scale,
        journal: Journal,
        tell: Callable[[str], None] = lambda line: None,
        labeled: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.palette, self.batches, self.scale, self.labeled = palette, batches, scale, labeled
        self.journal, self.tell = journal, tell
        self.errors: dict[Mix, float] = {}
        self.costs: dict[Measure, dict[Mix, float]] = {}

    def of(self, palette: Palette) -> HybridSearch:
        """Return the same search with other students."""
        return HybridSearch(palette, self.batches, self.scale, self.journal, self.tell, self.labeled)

    @property
    def has_head(self) -> bool:
        """Return whether the ends are classes."""
        return self._teacher[0].ndim == 2

    @cached_property
    @torch.no_grad()
    def _teacher(self) -> list[Tensor]:
        """The teacher's end of each batch."""
        return [end_of(self.palette.teacher, batch) for batch in self.batches]

    @cached_property
    def _costed(self) -> nn.Module:
        """The teacher at the size of the costs."""
        return self._sized(copy.deepcopy(self.palette.teacher))

    def _sized(self, model: nn.Module) -> nn.Module:
        if image_size(model) != self.scale.size:
            resize(model, self.scale.size)
        return model

    def error(self, mix: Mix) -> float:
        """Return the error of a mix at the teacher's end."""
        if mix not in self.errors:
            key = f"error {_seen(self.batches)} {self.palette.key(mix)}"
            self.errors[mix] = self.journal.known(key, partial(self._error, mix))
        return self.errors[mix]

    @torch.no_grad()
    def _error(self, mix: Mix) -> float:
        student = self.palette.model(mix)
        error = end_error([end_of(student, batch) for batch in self.batches], self._teacher)
        if not math.isfinite(error):
            raise TransferError(
                f"the error of {' '.join(mix)} is {error}: the teacher, a student or an image holds or makes values "
                "that are not finite"
            )
        self.tell(f"error {error:.4g}: {' '.join(mix)}")
        return error

    def top1(self, mix: Mix) -> float:
        """Return the accuracy of a mix on the labeled images, in percent.

        Raises DataError: there are no labeled images, or a label is no class of the teacher.
        """
        key = f"top1 {_seen([images for images, _ in self.labeled])} {self.palette.key(mix)}"
        return self.journal.known(key, lambda: evaluate(self.palette.model(mix), self.labeled).top1)

    def cost(self, measure: Measure, mix: Mix) -> float:
        """Return the cost of a mix as a share of the teacher's, or the number of layers that are kept."""
        found = self.costs.setdefault(measure, {})
        if mix not in found:
            found[mix] = self.journal.known(self._key(measure, mix), partial(self.measure, measure, mix))
        return found[mix]

    def _key(self, measure: Measure, mix: Mix) -> str:
        plan = "; ".join(f"{layer}: {choice}" for layer, choice in self.palette.plan(mix).items())
        return f"{self._where(measure)} {plan or KEEP}"

    def _where(self, measure: Measure) -> str:
        scale = self.scale
        where = f" on {machine()}" if measure == "latency" else ""
        return f"{measure} {scale.size[0]}x{scale.size[1]} batch {scale.batch} {scale.device.type}{where}"

    def measure(self, measure: Measure, mix: Mix) -> float:
        """Return what `cost` does, measured now."""
        if mix == self.palette.kept:
            return float(sum(map(len, self.palette.groups()))) if measure == "keep" else 1.0
        models = {"teacher": self._costed, "student": self._sized(self.palette.model(mix))}
        costs = self.scale.costs(measure, models)
        cost = costs["student"] if measure == "keep" else costs["student"] / costs["teacher"]
        self.tell(f"{measure} {cost:.3f}: {' '.join(mix)}")
        return cost

    def error_sum(self) -> Sum:
        """Return the error of every single replacement, as a sum."""
        return Sum(
            0.0,
            {
                (layer, name): self.error(self.palette.single([layer], name))
                for layer, name in self.palette.pairs
            },
        )

    def cost_sum(self, measure: Measure) -> Sum:
        """Return what every single replacement adds to the cost of the whole model, as a sum.

        All layers of one shape are replaced together, and each has its share of the difference.
        """
        parts: dict[tuple[int, str], float] = {}
        for name, own in self.palette.layers.items():
            for group in self.palette.groups():
                layers = [layer for layer in group if layer in own]
                if layers:
                    mix = self.palette.single(layers, name)
                    added = (self.cost(measure, mix) - self.cost(measure, self.palette.kept)) / len(layers)
                    parts |= {(layer, name): added for layer in layers}
        return Sum(self.cost(measure, self.palette.kept), parts)

    def best(self, budget: Budget, *, width: int = 4, rounds: int = 40) -> Hybrid:
        """Return the measured mix of the least error within the budget.

        Each round measures the `width` best mixes by the sums, until all of them are measured. Then the best one is
        taken; where it was timed, only if a second measurement agrees, which counts from then on.

        Raises ConfigError: no mix is as cheap.
        """
        first_error, first_cost = self.error_sum(), self.cost_sum(budget.measure)
        costs, is_timed = self.costs[budget.measure], budget.measure == "latency"
        for _ in range(rounds):
            error, cost = first_error.corrected(self.errors), first_cost.corrected(costs)
            known = costs.keys() & self.errors.keys()
            dear = [mix for mix in known if costs[mix] > budget.limit]
            proposed = set(self._proposed(error, cost, budget.limit, width, dear)) - known
            for mix in sorted(proposed):
                self.error(mix), self.cost(budget.measure, mix)
            fitting = [mix for mix in known if costs[mix] <= budget.limit]
            if proposed:
                continue
            if not fitting:
                break
            mix = min(fitting, key=lambda mix: (self.error(mix), mix))
            found = costs[mix] = self._confirmed(mix) if is_timed else costs[mix]
            if found <= budget.limit * (SLACK if is_timed else 1):
                return Hybrid(mix, self.error(mix), found, first_error.of(mix), first_cost.of(mix))
        raise self._too_little(budget, self.cheapest(first_cost))

    def check(self, budget: Budget) -> None:
        """Raise ConfigError where no mix is as cheap. Weights do not matter, so that it can be known beforehand."""
        cheapest = self.cheapest(self.cost_sum(budget.measure))
        slack = SLACK if budget.measure == "latency" else 1
        if self.cost(budget.measure, cheapest) > budget.limit * slack:
            raise self._too_little(budget, cheapest)

    def _too_little(self, budget: Budget, cheapest: Mix) -> ConfigError:
        if cheapest == self.palette.kept:
            height, width = self.scale.size
            return ConfigError(
                f"--{budget.measure} {budget.limit:g}: no operator is cheaper than the teacher's attention at "
                f"{height}x{width}: give others, or larger images by --img_size"
            )
        least = math.ceil(1000 * self.cost(budget.measure, cheapest)) / 1000
        return ConfigError(
            f"--{budget.measure} {budget.limit:g}: the cheapest mix of these operators has {least:g}: raise it, or "
            "give cheaper operators"
        )

    def _proposed(self, error: Sum, cost: Sum, limit: float, width: int, dear: Sequence[Mix]) -> list[Mix]:
        """Return the `width` best mixes by the sums, the best first, without those that were measured as too `dear`."""
        found: list[Mix] = []
        while len(found) < width:
            mix = choose(error, cost, limit, self.palette.depth, [*dear, *found])
            if mix is None:
                break
            found.append(mix)
        return found

    def _confirmed(self, mix: Mix) -> float:
        """Return the latency of a mix, measured again: the best of many that were measured once was lucky, too."""
        return self.journal.known(f"again {self._key('latency', mix)}", partial(self.measure, "latency", mix))

    def cheapest(self, cost: Sum) -> Mix:
        """Return the mix of the least cost, by a sum."""
        names = [KEEP, *self.palette.layers]
        return tuple(
            min(names, key=lambda name: cost.parts.get((layer, name), 0.0 if name == KEEP else np.inf))
            for layer in range(self.palette.depth)
        )


SLACK = 1.02
"""How far a latency that is measured again may be above its budget: two measurements of one model differ as much."""
