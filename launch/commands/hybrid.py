"""`graftvit hybrid TEACHER`: choose the operator of each layer of a teacher, under a budget of time or memory."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ...models.errors import ConfigError, DataError, RunFailedError
from ...transfer.analysis.report.tables import aligned
from ..flags import SOURCE_HELP, command_parser, parse_command, source_keywords, whole
from ..load_config import Setting, load_config
from ..say import hint, say, tell
from ..submitted import Work, check_here
from .convert import given_flags

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...checkpoints.provenance import Pretrained
    from ...transfer.cells import Share
    from ...transfer.config import DataConfig, RunConfig
    from ...transfer.hybrid_search import Budget, Hybrid, HybridSearch, Measure, Mix, Palette

EXAMPLES = (
    "graftvit hybrid deit_small_patch16_224.fb_in1k --latency 0.8,0.6 --img_size 448 --data_path D --output_dir mix",
    "graftvit hybrid runs/teacher --macs 0.5 --operators 'linear, window(window=3)' --dataset digits --output_dir mix",
    "graftvit hybrid runs/teacher --memory 0.7 --dataset digits --output_dir mix    # trains nothing again",
    "graftvit hybrid runs/teacher --keep 3 --student linear=runs/linear/1-align --dataset digits --output_dir keep",
)
MEASURES: dict[Measure, str] = {
    "latency": "seconds of a forward pass on this device (on a CPU, processor time)",
    "macs": "multiplications",
    "energy": "energy of multiplications and additions",
    "memory": "memory that a forward pass of training needs",
    "keep": "layers that keep the teacher's attention",
}
OPERATORS = ("linear", "hedgehog", "focused", "window")
DEFAULTS = {
    "optim.max_steps": 200,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.0,
    "optim.clip_grad": 3.0,
    "engine.report": False,
    "engine.evaluate_teacher": False,
}
"""What an alignment of an operator is where nobody says otherwise; ours."""
SECTIONS = (
    *("teacher.model", "teacher.model_args", "teacher.revision", "data", "optim", "align", "engine", "seed"),
    *("student.calibrate", "student.without"),
)


def run(argv: list[str]) -> int:
    """Align what is not aligned yet, measure, choose, and write a folder for each budget."""
    arguments, config = _parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes each start and stop to stderr
    check_here(str(config.teacher.source), *arguments.student.values(), data=config.data)
    from ...checkpoints.pretrained import load_pretrained
    from ...transfer.cells import parse_share

    share = parse_share(arguments.share)
    teacher = load_pretrained(str(config.teacher.source), identified=True, **source_keywords(config.teacher))
    students = {name: load_pretrained(source, identified=True) for name, source in arguments.student.items()}
    search = _search(arguments, config, teacher, students)
    for budget in _budgets(arguments):
        search.check(budget)
    missing = _align(arguments, config, share)
    for name in arguments.operators:
        if name not in missing:
            students[name] = load_pretrained(str(_folder(arguments, name)), identified=True)
    search = search.of(_palette(teacher, students, search.scale.device))
    search.error_sum()
    if missing:
        tell(f"{', '.join(missing)}: not aligned yet by other shares; the last one chooses")
        return 0
    with FileLock(arguments.output_dir / ".choosing"):  # the last two shares may end together
        return _choose(arguments, config, teacher, search)


def _choose(
    arguments: argparse.Namespace, config: RunConfig, teacher: Pretrained, search: HybridSearch
) -> int:
    """Choose a mix for each budget; say, draw and write what comes out."""
    from ...transfer.hybrid_search import KEEP

    budgets = _budgets(arguments) or _spread(search)
    found = {budget: search.best(budget) for budget in budgets}
    uniform = {
        name: search.palette.single(range(search.palette.depth), name) for name in search.palette.layers
    }
    others = {"teacher": search.palette.kept, **{f"*: {name}": mix for name, mix in uniform.items()}}
    by_measure: dict[Measure, dict[Budget, Hybrid]] = {}
    for budget in budgets:
        by_measure.setdefault(budget.measure, {})[budget] = found[budget]
    say(
        "\n".join(_table(search, measure, own, others) for measure, own in by_measure.items())
        + _notes(search)
    )
    _draw(search, by_measure, others, arguments.output_dir)
    for budget, hybrid in found.items():
        if any(name != KEEP for name in hybrid.mix):
            folder = arguments.output_dir / _name(arguments, budget)
            student = _write(search.palette, teacher, hybrid.mix, folder)
            say(f"{folder}\n  recover it: {_recovery_command(student, folder, config)}\n")
    return 0


def _name(arguments: argparse.Namespace, budget: Budget) -> str:
    """Return the name of a hybrid's folder, of which the same budget at another scale has another one."""
    pixels = f"-{arguments.img_size}px" if arguments.img_size else ""
    batch = f"-batch{arguments.cost_batch}" if arguments.cost_batch > 1 else ""
    return f"{budget}{pixels}{batch}".replace(" ", "-")


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and, with `here`, the models and the images."""
    arguments, config = _parse(argv)
    if here:
        check_here(str(config.teacher.source), *arguments.student.values(), data=config.data)
    return Work(arguments.output_dir, workers=config.data.workers, divisible=True)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = command_parser(
        "hybrid",
        "Choose which layers of a teacher become which cheaper attention, so that the model stays nearest to the "
        "teacher at the cost that you allow. Each operator is aligned once in every layer, on images without labels; "
        "each replacement alone has an error and a cost, and the best mix by their sums is built, measured, and "
        "corrected by what was measured. What is known stays in the output folder: another budget or image size "
        "trains nothing, and a stopped command resumes.",
        EXAMPLES,
        usage="TEACHER [--latency SHARE[,SHARE]] --output_dir DIR [--flag value ...]",
    )
    parser.add_argument("teacher", metavar="TEACHER", help=SOURCE_HELP)
    for measure, what in MEASURES.items():
        counted = measure == "keep"
        text = f"budgets of {what}" + ("" if counted else ", as shares of the teacher's")
        kind, metavar = (_counts, "K") if counted else (_shares, "SHARES")
        parser.flag(f"--{measure}", text, type=kind, default=(), metavar=metavar)
    text = f"operators to choose from, separated by commas; {', '.join(OPERATORS)} by default"
    parser.flag("--operators", text, type=_operators, default=None, metavar="NAMES")
    text = "a student of this teacher that is aligned already, to choose layers from; may be repeated"
    parser.flag("--student", text, action="append", type=_named, default=[], metavar="NAME=SOURCE")
    parser.flag(
        "--img_size", "side of the images that costs are measured at", type=whole(1), metavar="PIXELS"
    )
    parser.flag("--cost_batch", "images in a batch of the costs", type=whole(1), default=1, metavar="N")
    parser.flag(
        "--images", "training images that errors are measured on", type=whole(1), default=64, metavar="N"
    )
    text = "validation images that top-1 is measured on, where they have labels; 0 for none"
    parser.flag("--validation", text, type=whole(0), default=1000, metavar="N")
    parser.share("align the I-th of N shares of the operators; the last share that ends chooses")
    parser.output_dir("folder of the library, of what was measured, and of the hybrids")
    arguments, settings = parse_command(parser, argv, only=SECTIONS)
    if arguments.output_dir is None:
        raise ConfigError(
            "--output_dir is missing: give a folder, in which everything that is measured stays"
        )
    if arguments.operators is None:
        arguments.operators = () if arguments.student else OPERATORS
    taken = {"keep", *arguments.operators}
    for name, _ in arguments.student:
        if name in taken:
            raise ConfigError(f"--student {name}: an operator or a student has this name; give another one")
        taken.add(name)
    arguments.student = dict(arguments.student)
    below = [
        Setting(key, value, "graftvit hybrid", layer="graftvit hybrid") for key, value in DEFAULTS.items()
    ]
    source = Setting("teacher.source", arguments.teacher, "TEACHER")
    mode = [Setting("mode", "align", "graftvit hybrid", layer="graftvit hybrid")]
    plan = Setting("student.plan", f"*: {next(iter(arguments.operators), 'linear')}", "--operators")
    return arguments, load_config(None, [*mode, *below, *settings, source, plan])


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give shares of the teacher's between 0 and 1, such as 0.8,0.6"
        )
    return found


def _counts(text: str) -> tuple[float, ...]:
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of layers, such as 3 or 1,2,3")
    return tuple(float(word) for word in text.split(","))


def _operators(text: str) -> tuple[str, ...]:
    found = tuple(word.strip() for word in re.split(r",(?![^()]*\))", text) if word.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: give operators, such as 'linear, window(window=3)'")
    return tuple(dict.fromkeys(found))


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a name and a source, such as linear=runs/linear/1-align"
        )
    return name, source


def _budgets(arguments: argparse.Namespace) -> list[Budget]:
    from ...transfer.hybrid_search import Budget

    return [
        Budget(measure, limit)
        for measure in MEASURES
        for limit in sorted(getattr(arguments, measure), reverse=True)
    ]


def _spread(search: HybridSearch, count: int = 5) -> list[Budget]:
    """Return budgets of latency from the teacher's down to that of the cheapest mix."""
    from ...transfer.hybrid_search import Budget

    cost = search.cost_sum("latency")
    least = cost.of(search.cheapest(cost))
    return [Budget("latency", round(1 - (1 - least) * step / count, 3)) for step in range(1, count + 1)]


# The library: the teacher's layers with each operator, aligned.


def _folder(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.output_dir / "library" / re.sub(r"\W+", "_", name).strip("_")


def _align(arguments: argparse.Namespace, config: RunConfig, share: Share) -> list[str]:
    """Align what is not aligned yet of this share's operators; return those that other shares have still to align."""
    from ...transfer.cells import StoppedError
    from ...transfer.engine.stages import train_students

    names = arguments.operators[share.index :: share.count]
    students = {
        _folder(arguments, name).name: config.model_copy(
            update={
                "student": config.student.model_copy(update={"plan": f"*: {name}"}),
                "output_dir": _folder(arguments, name).parent,
            }
        )
        for name in names
    }
    done = train_students(students) if students else None
    if done is not None and done.signal is not None:
        raise StoppedError(done.signal, "while operators were aligned")
    for name, error in {} if done is None else done.failures.items():
        raise RunFailedError(f"library/{name}: {error}")
    return [name for name in arguments.operators if not (_folder(arguments, name) / "student").is_dir()]


def _palette(teacher: Pretrained, students: Mapping[str, Pretrained], device: torch.device) -> Palette:
    from ...transfer.hybrid_search import Palette

    models = {name: each.model.to(device) for name, each in students.items()}
    digests = {name: str(each.digest) for name, each in students.items()}
    return Palette(teacher.model.to(device), models, digests)


def _search(
    arguments: argparse.Namespace, config: RunConfig, teacher: Pretrained, students: Mapping[str, Pretrained]
) -> HybridSearch:
    """Return the search with operators that are not aligned, which cost what aligned ones do."""
    import torch

    from ...models.conversion import convert
    from ...models.families import image_size
    from ...transfer.analysis.benchmark import check_fills
    from ...transfer.data.survey import sample_images
    from ...transfer.hybrid_search import HybridSearch, Journal, Palette, Scale

    cuda = torch.cuda.is_available() and config.engine.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    models = {name: each.model.to(device) for name, each in students.items()}
    for name in arguments.operators:
        models[name] = convert(teacher.model, f"*: {name}", without=config.student.without).to(device)
    palette = Palette(teacher.model.to(device), models)
    height, width = image_size(teacher.model) or teacher.preprocessing.input_size[1:]
    size = (arguments.img_size or height, arguments.img_size or width)
    if arguments.img_size:
        check_fills(teacher.model, arguments.img_size)
    images = sample_images(config.data, teacher.preprocessing, arguments.images, seed=config.seed + 1)
    journal = Journal(arguments.output_dir / "hybrid.jsonl", str(teacher.digest))
    batches = images.to(device).split(config.data.batch_size)
    labeled = _labeled(config.data, teacher, arguments.validation, device)
    scale = Scale(size, arguments.cost_batch, device)
    return HybridSearch(palette, batches, scale, journal, tell, labeled)


def _labeled(
    data: DataConfig, teacher: Pretrained, count: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return `count` images from all over the validation split, and their labels; none that are no classes."""
    import torch

    from ...models.families import classifier_of
    from ...transfer.data.loaders import create_eval_loader
    from ...transfer.metrics.measure import check_classes

    head = classifier_of(teacher.model)
    if not count or not isinstance(head, torch.nn.Linear):
        return []
    one = data.model_copy(update={"eval_batch_size": 1})
    try:
        whole = create_eval_loader(one, teacher.preprocessing)
        check_classes(str(teacher.source), head.out_features, whole)
    except DataError as error:
        tell(f"top-1 is not measured: {error}")
        return []
    steps = -(-whole.num_samples // count)
    read = create_eval_loader(one, teacher.preprocessing, world_size=steps) if steps > 1 else whole
    found = [(images.to(device), labels.to(device)) for images, labels, valid in read if valid]
    images, labels = (torch.cat(each).split(data.batch_size) for each in zip(*found, strict=True))
    return list(zip(images, labels, strict=True))


# What comes out.


def _table(
    search: HybridSearch, measure: Measure, found: Mapping[Budget, Hybrid], others: Mapping[str, Mix]
) -> str:
    """Return the table of the hybrids under budgets of one measure, below the teacher and the uniform plans."""
    from ...models.converted import whole_plan

    scored = ["top-1"] if search.labeled else []
    rows = [["", *scored, "error", "by the sum", measure, "by the sum", "plan"]]
    for name, mix in others.items():
        top1 = [f"{search.top1(mix):.1f}" for _ in scored]
        rows.append([name, *top1, f"{search.error(mix):.4g}", "", f"{search.cost(measure, mix):.3f}", "", ""])
    for budget, each in found.items():
        top1 = [f"{search.top1(each.mix):.1f}" for _ in scored]
        numbers = [f"{number:.4g}" for number in (each.error, each.predicted_error)]
        costs = [f"{number:.3f}" for number in (each.cost, each.predicted_cost)]
        plan = whole_plan(search.palette.model(each.mix))
        rows.append([str(budget), *top1, *numbers, *costs, plan])
    return aligned(rows, right=range(1, len(rows[0]) - 1))


def _notes(search: HybridSearch) -> str:
    kind = "KL of the classes, nats" if search.has_head else "squared distance of the final tokens / variance"
    height, width = search.scale.size
    count = sum(len(labels) for _, labels in search.labeled)
    top1 = f"top-1: in percent, on {count} validation images, before recovery\n" if count else ""
    return (
        f"{top1}error: {kind}, on {sum(map(len, search.batches))} training images, before recovery\n"
        f"costs: shares of the teacher's, at {height}x{width}, batch {search.scale.batch}, {search.scale.device}; of "
        "keep the number of layers\n"
    )


def _write(palette: Palette, teacher: Pretrained, mix: Mix, folder: Path) -> nn.Module:
    """Write a hybrid as a model folder, and return it."""
    from ...checkpoints.student import write_converted

    student = palette.model(mix).cpu().requires_grad_(True)
    write_converted(student, folder, teacher, weights="all", overwrite=True)
    return student


def _recovery_command(student: nn.Module, folder: Path, config: RunConfig) -> str:
    """Return the command that recovers a hybrid on the images that it was chosen by."""
    models = ["--student.model", f"local-dir:{folder}", *given_flags("teacher", config.teacher)]
    images = [*given_flags("data", config.data), "--output_dir", f"{folder}-recovered"]
    return hint("train", *recovery_flags(student), *models, *images)


def recovery_flags(student: nn.Module) -> list[str]:
    """Return the flags of `graftvit train` that teach a hybrid its teacher's end without labels.

    Only converted attention learns: a few steps of all weights cost a mix near the teacher more than they give.
    """
    from ...models.converted import ConvertedAttention

    found = [name for name, part in student.named_modules() if isinstance(part, ConvertedAttention)]
    learning = rf"^({'|'.join(map(re.escape, found))})\."
    how = ["--method", "feature", "--feature_loss", "mse", "--tokens", "both", "--task_weight", "0"]
    return ["--mode", "transfer", *how, "--trainable", learning]


def _draw(
    search: HybridSearch,
    found: Mapping[Measure, Mapping[Budget, Hybrid]],
    others: Mapping[str, Mix],
    folder: Path,
) -> None:
    """Draw error against cost, a plot for each measure, into `front.png`; and top-1 into `front_top1.png`."""
    from ...checkpoints.atomic import write_bytes
    from ...transfer.analysis.report.ink import FAINT, INK, Line, color_of, draw_lines, to_png

    def draw(name: str, value: Callable[[Mix], float], file: str, *, every: bool) -> None:
        panels: dict[str, list[Line]] = {}
        for measure, hybrids in found.items():
            cost = partial(search.cost, measure)
            known = [mix for mix in search.errors if every and mix in search.costs[measure]]
            chosen = sorted({each.mix: each for each in hybrids.values()}, key=cost)
            panels[measure] = [
                Line("measured", [*map(cost, known)], [*map(value, known)], FAINT["light"], ""),
                Line("hybrids", [*map(cost, chosen)], [*map(value, chosen)], INK["light"]),
            ][not every :]
            for place, (other, mix) in enumerate(others.items()):
                panels[measure].append(Line(other, [cost(mix)], [value(mix)], color_of(place)))
        figure = draw_lines(panels, "light", ("cost", name), ticks=False)
        write_bytes(folder / file, to_png(figure, ground="white"))

    draw("error", search.error, "front.png", every=True)
    if search.labeled:
        draw("top-1", search.top1, "front_top1.png", every=False)
