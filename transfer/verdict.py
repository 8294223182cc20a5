"""What a run says at its end: its student, its gain, how near its attention is to the teacher's, what it learned from.

The lines are logged; `verdict.json` and `report.html` in the run folder have them too. Only the first process measures
and writes, without the others: no failure here can stop or fail a run that is over.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError, computed_field
from torch import Tensor

from ..checkpoints.atomic import write_text
from ..checkpoints.files import read_if_there, read_records
from ..checkpoints.pretrained import load
from ..models.copying.teacher_view import Normalization
from ..models.errors import DataError, GraftError, Json, one_sentence
from .analysis.layer_maps import preprocessed, spread_images
from .analysis.report.ink import GRAY, Line, color_of, dashes_of, draw_lines
from .analysis.report.rendering import Figure, compose
from .analysis.report.tables import Table
from .config import DataConfig
from .data.sampler import preserved, seed_batch
from .engine.loop import Loop
from .engine.students import sharded_teachers
from .engine.tasks import Losses, Task, TransferTask
from .methods.dual import DualViT
from .methods.loss_terms import Term

if TYPE_CHECKING:
    from .engine.fence import Fence

logger = logging.getLogger(__name__)
T = TypeVar("T")
RECORD, PAGE = "verdict.json", "report.html"
IMAGES = 16
"""Images that the maps are compared on."""
UNBALANCED = 15.0
"""A transfer loss with so many times the task's gradient gets a line of advice."""
POINTS = 300
"""Points of a curve at most."""


class Verdict(BaseModel, frozen=True):
    """What is known of a run that is over. `lines` says it in words."""

    run_id: str
    step: int = Field(ge=0)
    average: bool
    """Whether the run has a moving average of its student."""
    metric: str
    """The number in the log that the values are of: what chooses the best state, or without it the training loss."""
    last: float
    """Its last value, of the student."""
    last_average: float | None
    """The same of the average."""
    best: float | None
    """The value of the best state, which is that of the average where there is one."""
    baseline: float | None
    """What `last` is compared with; None where there is nothing."""
    baseline_is: str
    """The baseline in words."""
    divergences: dict[str, float]
    """KL(P_t ‖ P_s) of the attention maps in nats, by the name of the loss of a layer (`DualViT.map_divergences`)."""
    images: str
    """The images of `divergences` in words."""
    gradients: dict[str, float]
    """Norm of the gradient of each weighted loss with respect to the student's parameters that learn."""
    advice: str
    """What would balance the losses; empty if none outweighs the task."""
    unmeasured: str
    """Why maps and gradients could not be measured; empty if they could."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gain(self) -> float | None:
        """The last value less the baseline."""
        return None if self.baseline is None else self.last - self.baseline

    @computed_field  # type: ignore[prop-decorator]
    @property
    def map_divergence(self) -> float | None:
        """The mean of `divergences`."""
        return sum(self.divergences.values()) / len(self.divergences) if self.divergences else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shares(self) -> dict[str, float]:
        """The part of each loss in the sum of `gradients`."""
        total = sum(self.gradients.values())
        return {name: norm / total for name, norm in self.gradients.items()} if total else {}

    def lines(self, folder: Path) -> list[str]:
        """Return what it says of the run in `folder`."""
        return [f"{name}: {words}" for name, words in self.sentences(folder).items()]

    def sentences(self, folder: Path) -> dict[str, str]:
        """Return the same by subject."""
        found = {
            "student": self._where(folder),
            "result": self._result(),
            "attention": self._maps(),
            "gradient": self._shares(),
            "advice": self.advice,
            "not measured": self.unmeasured,
        }
        return {name: words for name, words in found.items() if words}

    def _where(self, folder: Path) -> str:
        others = {
            "#ema": ("its moving average", self.average),
            "#best": ("the best state", self.best is not None),
        }
        named = ", ".join(f"{folder}{part} is {what}" for part, (what, there) in others.items() if there)
        return (
            f"{folder / 'student'}, that of the last step; graftvit.load({str(folder)!r}) and `graftvit evaluate "
            f"{shlex.quote(str(folder))}` take it{named and f'; {named}'}"
        )

    def _result(self) -> str:
        average = "" if self.last_average is None else f" ({self._number(self.last_average)} of the average)"
        best = "" if self.best is None else f", at best {self._number(self.best)}"
        if best and average:
            best += " of the average"
        gain = ""
        if self.gain is not None:
            size = f"{abs(self.gain):.2f} points" if self._in_percent else f"{abs(self.gain):.4g}"
            gain = f"; {size} {'above' if self.gain >= 0 else 'below'} {self.baseline_is}"
        return f"{self.metric} {self._number(self.last)}{average}{best}{gain}"

    @property
    def _in_percent(self) -> bool:
        return self.metric.endswith("top1")

    def _number(self, value: float) -> str:
        return f"{value:.2f} %" if self._in_percent else f"{value:.4g}"

    def _maps(self) -> str:
        if self.map_divergence is None:
            return ""
        layers = ", ".join(f"{name} {value:.3g}" for name, value in self.divergences.items())
        return (
            f"KL divergence of the student's maps from the teacher's {self.map_divergence:.3g} nats in the mean of the "
            f"layers ({layers}), on {self.images}"
        )

    def _shares(self) -> str:
        if len(self.shares) < 2:
            return ""
        parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares.items())
        return f"shares of the losses, by norm, on the last training batch: {parts}"


# Measure.


def gradient_norms(task: Task, losses: Losses, scale: float = 1.0) -> dict[str, float]:
    """Return ‖∇_θ w_i L_i‖ of each weighted loss of a step, θ the student's parameters that learn.

    `losses` is what `task` gave for a batch; `scale` multiplies them on their way back, as float16 needs.
    """
    student = [parameter for parameter in task.trainable.parameters() if parameter.requires_grad]
    norms = {}
    for name, loss in task.weighted(losses).items():
        found: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss * scale, student, retain_graph=True, allow_unused=True)
        parts = [torch.linalg.vector_norm(each.float()) for each in found if each is not None]
        norms[name] = float(torch.stack(parts).norm()) / scale if parts else 0.0
    return norms


def advise(norms: Mapping[str, float], weights: Mapping[str, tuple[str, float]]) -> str:
    """Return the weight that gives the loss with the largest gradient that of the task; empty if none outweighs it.

    `weights` has the setting of a loss, and its value.
    """
    own = norms.get("task", 0.0)
    others = {name: norm for name, norm in norms.items() if name in weights}
    name = max(others, key=lambda each: others[each], default="")
    if not own or not others or others[name] < UNBALANCED * own:
        return ""
    key, weight = weights[name]
    return (
        f"the gradient of {name} is {others[name] / own:.0f} times the task's; "
        f"{key}={weight * own / others[name]:.2g} would make the two equal"
    )


def _weights(task: TransferTask) -> dict[str, tuple[str, float]]:
    """Return the key and the weight of each transfer loss by its name in `weighted`."""
    found = {}
    for index, term in enumerate(task.dual.terms):
        key = f"transfer.losses[{index}].weight" if term.label else "transfer.weight"
        found[term.label or term.settings.method] = (key, term.settings.weight)
    return found


def _gradients(loop: Loop) -> dict[str, float]:
    """Return the norms on the last batch, with the random numbers of its step and the weights after it."""
    task, accelerator, last = loop.parts.task, loop.accelerator, loop.last_batch()
    seed_batch(loop.config.seed, last.epoch, last.place, accelerator.device)
    with accelerator.autocast():
        losses = task.forward(*last.batch)  # itself: neither compiled, nor over processes
    scale = 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
    return gradient_norms(task, losses, scale)


def _divergences(task: TransferTask, loop: Loop, data: DataConfig) -> tuple[dict[str, float], str]:
    """Return the divergences of the maps, and of which images."""
    images, words = _images(loop, data)
    images = images.to(loop.accelerator.device)
    found = {} if loop.config.engine.fsdp else task.dual.map_divergences(images)
    for term in task.dual.terms:
        names = {term.loss_name(link) for link in term.plan.links}
        if term.method.uses_heads and not term.method.copies and not names & found.keys():
            found |= _divergences_apart(term, loop, images)
    return found, f"{len(images)} {words} images"


def _divergences_apart(term: Term, loop: Loop, images: Tensor) -> dict[str, float]:
    """Return the divergences of the student as it was written, where a loss is not of maps or the model is sharded.

    Nothing where the maps of the two cannot be compared.
    """
    spec, settings = loop.parts.spec, term.settings
    try:
        probe = DualViT(
            {term.side.name: term.side.model},
            load(loop.config.output_dir / "student").to(images.device),
            "distill",
            teacher_normalization=term.side.normalization,
            student_normalization=Normalization(spec.mean, spec.std),
            calibration=images,
            layers=[(link.pair.teacher, link.pair.student) for link in term.plan.links],
            heads=settings.heads,
            interpolate_grid=settings.interpolate_grid,
        )
        return {f"{term.prefix}{name}": value for name, value in probe.map_divergences(images).items()}
    except GraftError:
        return {}


def _images(loop: Loop, data: DataConfig) -> tuple[Tensor, str]:
    """Return images that are spread over the test images; the first of a stream; without any, of the last batch."""
    spec, loader = loop.parts.spec, loop.parts.eval_loader
    if loader is None:
        return loop.last_batch().batch[0][:IMAGES], "training"
    try:
        here = data.model_copy(update={"workers": 0, "download": False})
        source = spread_images(here, spec.input_size[0], IMAGES)
        return next(preprocessed(source, here, spec, IMAGES)), "test"
    except DataError:  # as of a stream, whose images cannot be chosen
        images, _, valid = next(iter(loader))
        return images[valid][:IMAGES], "test"


def _baseline(loop: Loop, key: str, records: Sequence[Json]) -> tuple[float | None, str]:
    """Return what the last value is compared with: the teacher, the value before training, or the first one."""
    position, loader = loop.position, loop.parts.eval_loader
    if key == "test_top1" and "teacher_top1" in position.metrics:
        teacher = position.metrics["teacher_top1"]
        return teacher, f"the teacher's {teacher:.2f} %"
    if records and records[0]["step"] < position.step:
        step, value = records[0]["step"], float(records[0][key])
        return value, f"its own {value:.4g} {f'of step {step}' if step else 'before the first step'}"
    if key == "test_top1" and loader is not None:
        chance = 100 / loader.num_classes
        return chance, f"the {chance:.3g} % of chance"
    return None, ""


def measure(loop: Loop, data: DataConfig) -> Verdict:
    """Measure a run that is over; `data` is where its images lie now.

    Raises DataError: the log has no record.
    """
    choice, position, task = loop.parts.choice, loop.position, loop.parts.task
    key = "train_loss" if choice is None else f"test_{choice.key}"
    log = loop.config.output_dir / "log.jsonl"
    records = [record for record in read_records(log) if key in record]
    if not records:
        raise DataError(f"{log} has no {key}")
    baseline, words = _baseline(loop, key, records)
    divergences: dict[str, float] = {}
    gradients: dict[str, float] = {}
    images = advice = unmeasured = ""
    if isinstance(task, TransferTask):
        if sharded_teachers(loop.config):
            unmeasured = "maps and gradients, because a teacher is sharded"
        else:
            divergences, images = _tried(partial(_divergences, task, loop, data), (divergences, images))
        if loop.config.engine.fsdp:
            unmeasured = unmeasured or "gradients, because the student is sharded"
        elif not unmeasured:
            gradients = _tried(partial(_gradients, loop), {})
            advice = advise(gradients, _weights(task))
    average = None if choice is None else position.metrics.get(f"test_ema_{choice.key}")
    return Verdict(
        run_id=position.run_id,
        step=position.step,
        average=loop.run_state.average is not None,
        metric=key,
        last=position.metrics.get(key, records[-1][key]),
        last_average=average,
        best=None if choice is None else position.best,
        baseline=baseline,
        baseline_is=words,
        divergences=divergences,
        images=images,
        gradients=gradients,
        advice=advice,
        unmeasured=unmeasured,
    )


def _tried(measured: Callable[[], T], otherwise: T) -> T:
    """Return what is measured; after any error a warning, and `otherwise`: the run is over, and its student written."""
    try:
        with preserved():
            return measured()
    except Exception as error:
        text = one_sentence(str(error)) or type(error).__name__
        logger.warning("the run is finished, and its verdict lacks a part: %s", text)
        return otherwise


def conclude(loop: Loop, data: DataConfig, fence: Fence) -> Verdict | None:
    """Say how a run that is over went, and write it into its folder; None after an error, which is a warning.

    A run that is resumed after its end keeps its verdict, and gets a new page.
    """

    def conclude() -> Verdict:
        folder, position = loop.config.output_dir, loop.position
        verdict = read_verdict(folder)
        if verdict is None or (verdict.run_id, verdict.step) != (position.run_id, position.step):
            verdict = measure(loop, data)
        for line in verdict.lines(folder):
            logger.warning("%s", line)
        with fence.guard():
            write_text(folder / RECORD, verdict.model_dump_json(indent=1) + "\n")
            write_text(folder / PAGE, render(verdict, folder))
        return verdict

    return _tried(conclude, None)


def read_verdict(folder: Path) -> Verdict | None:
    """Return the verdict in a run folder; None without one, or where it is damaged."""
    text = read_if_there(folder / RECORD)
    try:
        return None if text is None else Verdict.model_validate_json(text)
    except ValidationError:
        return None


# The page.


def render(verdict: Verdict, folder: Path) -> str:
    """Return the page of a run as HTML."""
    norms = [
        [name, f"{norm:.3g}", f"{100 * verdict.shares.get(name, 0.0):.1f} %"]
        for name, norm in verdict.gradients.items()
    ]
    return compose(
        "run.txt",
        folder=folder,
        step=verdict.step,
        verdict=Table(["", "verdict"], list(verdict.sentences(folder).items()), ["verdict"]),
        figures=[*_curves(read_records(folder / "log.jsonl")), *_by_layer(verdict)],
        gradients=Table(["loss", "norm of its gradient", "share"], norms) if norms else None,
    ).to_page()


def _curves(records: Sequence[Json]) -> list[Figure]:
    """Return the losses and the accuracies by step, as far as the log has them."""
    losses = {
        "loss": ("train_loss",),
        "transfer loss": ("train_transfer",),
        "task loss": ("train_task", "test_loss", "test_ema_loss", "test_objective", "test_ema_objective"),
    }
    accuracies = {"": ("teacher_top1", "test_top1", "test_ema_top1", "test_knn_top1", "test_ema_knn_top1",
                       "test_probe_top1", "test_ema_probe_top1")}  # fmt: skip
    scores = {name: (f"test_{name}", f"test_ema_{name}") for name in ("box_ap", "mask_ap", "miou")}
    found = []
    for name, heading, panels, axis in (
        ("losses", "Losses", losses, "loss"),
        ("accuracies", "Accuracies", accuracies, "top-1, %"),
        ("scores", "Detection and segmentation", scores, "score, of 1"),
    ):
        drawn = {title: lines for title, keys in panels.items() if (lines := _lines(records, keys))}
        if drawn:
            about = ", ".join(line.label for lines in drawn.values() for line in lines)
            size = (8.4, 1.0 + 2.2 * len(drawn))
            draw = partial(draw_lines, drawn, names=("step", axis), size=size, stacked=True, ticks=False)
            found.append(
                Figure(name, heading, "By optimizer step, as in log.jsonl.", f"Lines by step: {about}.", draw)
            )
    return found


def _lines(records: Sequence[Json], keys: Sequence[str]) -> list[Line]:
    lines = []
    end = max((int(record["step"]) for record in records if "step" in record), default=0)
    for place, key in enumerate(keys):
        found = {
            int(record["step"]): float(record[key])
            for record in records
            if key in record and "step" in record
        }
        points = sorted(found.items())[:: max(1, len(found) // POINTS)]
        if key == "teacher_top1" and points:
            lines.append(Line(key, [0, end], [points[0][1]] * 2, GRAY, "--"))
        elif points:
            lines.append(_line(key, points, place))
    return lines


def _line(label: str, points: Sequence[tuple[int, float]], place: int) -> Line:
    x, y = zip(*points, strict=True)
    return Line(label, x, y, color_of(place), dashes_of(place))


def _by_layer(verdict: Verdict) -> list[Figure]:
    """Return the divergences over the student's layers, a line for each loss; nothing without any."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, value in verdict.divergences.items():
        label, _, layer = name.rpartition("layer")
        points.setdefault(label.rstrip(".") or "KL divergence", []).append((int(layer), value))
    lines = [_line(label, sorted(found), place) for place, (label, found) in enumerate(points.items())]
    if not lines:
        return []
    names, top = ("layer of the student", "KL divergence"), max(verdict.divergences.values())
    draw = partial(draw_lines, {"": lines}, names=names, size=(8.4, 3.2), limits=(0.0, 1.08 * top or 1.0))
    figure = Figure(
        "maps",
        "Attention maps",
        f"KL divergence of the student's maps from the teacher's in nats, by layer, on {verdict.images}: 0 is the same "
        "map. The teacher's entropy, which cannot be learned away, is taken off.",
        "A line over layers: KL divergence of the attention maps.",
        draw,
    )
    return [figure]
