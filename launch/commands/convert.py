"""`graftvit convert SOURCE --plan PLAN`: replace the attention of a model, and write a model folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ...models.plan_syntax import DEFORMABLE
from ...transfer.analysis.report.tables import aligned
from ..flags import (
    IMAGE_SETTINGS,
    SOURCE_HELP,
    SOURCE_SETTINGS,
    command_parser,
    parse_command,
    source_keywords,
    whole,
)
from ..load_config import load_config
from ..say import hint, say
from ..submitted import Work, check_here

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor, nn

    from ...checkpoints.provenance import Pretrained
    from ...models.conversion import ConvertedAttention
    from ...transfer.config import RunConfig


EXAMPLES = (
    "graftvit convert vit_base_patch16_224.augreg_in1k --plan '*: linear; 9-11: softmax' --output_dir linear",
    "graftvit convert vit_base_patch16_224.mae --plan '*: window(window=7); -1: keep' --dry_run",
    "graftvit convert runs/teacher --plan '*: kernel(feature=relu)' --output_dir student --calibrate 64 "
    "--dataset digits",
    "graftvit convert hf-hub:facebook/dinov2-base --img_size 518 --plan '*: hybrid' --output_dir hybrid --weights mlp",
    "graftvit convert pvt_v2_b0 --plan 'stage1: hash' --calibrate 32 --data_path D --output_dir hashed",
    "graftvit convert swin_tiny_patch4_window7_224.ms_in1k --plan 'stage3: linear' --without bias --output_dir swin",
    "graftvit list operators   # what a plan can name",
)


def run(argv: list[str]) -> int:
    """Convert, print one line for each layer, and write the folder."""
    arguments, config = _parse(argv)
    teacher = _load_source(arguments.source, config, fresh=arguments.dry_run and not arguments.calibrate)
    images = None
    if arguments.calibrate:
        from ...transfer.data.survey import sample_images

        images = sample_images(config.data, teacher.preprocessing, arguments.calibrate, seed=config.seed)
    student = _convert(teacher, arguments, images, config)
    if not arguments.dry_run:
        _check_fitted(student)
    return _write(student, teacher, images, config, arguments)


def check(argv: list[str], *, here: bool = True) -> Work:
    """Check the arguments and the plan and, with `here`, the source and the images."""
    arguments, config = _parse(argv)
    if here:
        _convert(_load_source(arguments.source, config, fresh=True), arguments, None, config)
        check_here(data=config.data if arguments.calibrate else None)
    return Work(arguments.output_dir)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = command_parser(
        "convert",
        "Replace the attention operators in layers of a pretrained vision transformer. Nothing is trained: recovery "
        "starts from the folder that is written. A plan names layers and operators; where entries overlap, the last "
        "one wins.",
        EXAMPLES,
        usage="SOURCE --plan PLAN (--output_dir DIR | --dry_run) [--flag value ...]",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.flag("--plan", "such as '*: linear; 9-11: softmax'", required=True, metavar="PLAN")
    parser.output_dir("a new folder")
    text = "weights of the source to keep: all, all except the attention of converted layers (mlp), or none"
    parser.flag("--weights", text, choices=("all", "mlp", "none"), default="all")
    text = "fit the initial operators to their layers' outputs on N images of --dataset or --data_path"
    parser.flag("--calibrate", text, type=whole(0), default=0, metavar="N")
    parser.add_argument(
        "--without", action="append", default=[], choices=("bias",),
        help="a part of a pyramid's layers to give up where an operator does not take it: bias, the relative position "
        "bias (Swin)",
    )  # fmt: skip
    parser.switch("--dry_run", "print the table, write nothing")
    parser.switch("--force", "replace an existing model folder")
    arguments, settings = parse_command(parser, argv, only=(*SOURCE_SETTINGS, *IMAGE_SETTINGS))
    config = load_config(None, settings)
    _check_flags(arguments.output_dir, arguments.dry_run, arguments.calibrate, config)
    from ...checkpoints.student import refuse_to_convert

    if arguments.output_dir is not None and not arguments.dry_run:
        refuse_to_convert(arguments.output_dir, overwrite=arguments.force)
    return arguments, config


def _write(
    student: nn.Module,
    teacher: Pretrained,
    images: Tensor | None,
    config: RunConfig,
    arguments: argparse.Namespace,
) -> int:
    """Print the table and, unless this is a dry run, write the folder."""
    from ...models.conversion import nothing_given_up, plan_of

    out, weights, data = arguments.output_dir, arguments.weights, config.data.dataset or config.data.data_path
    seen = None if images is None else f"{len(images)} images of {data}"
    note = nothing_given_up(teacher.model, arguments.without)
    source = _describe_source(teacher) + (f"note: {note}\n" if note else "")
    table = conversion_table(teacher.model, student, weights, seen)
    say(source + _describe_tokens(teacher.model, student) + table)
    if arguments.dry_run or out is None:
        return 0
    from ...checkpoints.dense_models import dense_of, write_beside
    from ...checkpoints.student import write_converted

    dense = dense_of(arguments.source)
    beside = None if dense is None else partial(write_beside, dense, dense.state_dict())
    how = {"weights": weights, "calibration": seen, "overwrite": arguments.force}
    write_converted(student, out, teacher, beside=beside, **how)
    recovery = ""
    if dense is not None:
        flags = {
            "--teacher": arguments.source,
            "--dense.source": arguments.source,
            "--dense.head": dense.kind,
        }
        flags |= {"--plan": arguments.plan, "--dataset": SETS[dense.task], "--data_path": "FOLDER"}
        flags |= {"--short": str(dense.sides[0]), "--long": str(dense.sides[1])}
        words = [word for flag in flags.items() for word in flag]
        recovery = f"recover it: {hint('train', 'recover_detector', *words)}\n"
    elif not plan_of(teacher.model):
        recovery = _format_recovery(out, teacher, student, config)
    say(
        f"{out / 'model.safetensors'}  {sum(file.stat().st_size for file in out.iterdir()):,} bytes with config.json\n"
        f'load it: graftvit.load("{out}")\n' + recovery
    )
    return 0


def _convert(
    teacher: Pretrained, arguments: argparse.Namespace, images: Tensor | None, config: RunConfig
) -> nn.Module:
    import torch

    from ...checkpoints.student import FittedLayers
    from ...models.conversion import convert, plan_of

    kept = images is not None and arguments.output_dir is not None and not arguments.dry_run
    torch.manual_seed(config.seed)
    student = convert(
        teacher.model,
        arguments.plan,
        weights=arguments.weights,
        calibration=images,
        without=arguments.without,
        seed=config.seed,
        finished=FittedLayers(arguments.output_dir) if kept else None,
    )
    if plan_of(student) is None:
        from ...checkpoints.student import other_operator

        raise ConfigError(f"--plan {arguments.plan!r} keeps every layer: {other_operator(student)}")
    return student


def _check_fitted(student: nn.Module) -> None:
    """Raise ConfigError for a model that could not run, because operators of it were never fitted."""
    from ...models.conversion import converted_layers

    choices = [layer.choice for layer in converted_layers(student).values() if not layer.operator.fitted]
    if choices:
        raise ConfigError(
            f"--plan has {choices[0].operator}, which must be fitted to images: give --calibrate N with --dataset or "
            "--data_path"
        )


def _format_recovery(out: Path, teacher: Pretrained, student: nn.Module, config: RunConfig) -> str:
    """Return the command that starts recovery. It has the word FOLDER where the user writes the folder of images."""
    from ...models.conversion import converted_layers
    from ...models.merges import new_merges

    merged = bool(new_merges(teacher.model, student))
    mode = ["align"] if converted_layers(student) and not merged else ["transfer", "--method", "feature"]
    models = [
        "--student.model",
        f"local-dir:{out}",
        "--teacher.source",
        teacher.source,
        *given_flags("teacher", config.teacher),
    ]
    images = ["--data_path", "FOLDER", "--output_dir", f"{out}-recovered"]
    return (
        f"recover it: {hint('train', '--mode', *mode, *models, *images)}\n"
        + "the merges are new, and alignment trains layers alone: the command trains the whole student\n"
        * merged
    )


def given_flags(name: str, section: BaseModel) -> list[str]:
    """Return the flags of the values of a section that are not its defaults."""
    given = section.model_dump(mode="json", exclude_defaults=True)
    texts = {key: text if isinstance(text, str) else json.dumps(text) for key, text in given.items()}
    return [word for key, text in texts.items() for word in (f"--{name}.{key}", text)]


def _check_flags(out: Path | None, dry_run: bool, images: int, config: RunConfig) -> None:
    """Raise ConfigError if the flags contradict each other."""
    if out is None and not dry_run:
        raise ConfigError("--output_dir is missing: give a new folder, or --dry_run to see only the table")
    given = bool(config.data.dataset or config.data.data_path)
    if images and not given:
        raise ConfigError(f"--calibrate {images} needs images: give --data_path FOLDER, or --dataset digits")
    if given and not images:
        raise ConfigError("--dataset and --data_path need --calibrate N: give N, the number of images")


def _load_source(source: str, config: RunConfig, *, fresh: bool) -> Pretrained:
    """Load the model to convert; with `fresh`, build a timm name without downloading its weights."""
    from ...checkpoints.pretrained import load_pretrained

    return load_pretrained(source, **source_keywords(config.teacher), download=not fresh)


def _describe_source(teacher: Pretrained) -> str:
    from ...models.conversion import plan_of
    from ...models.families import family_of

    older = plan_of(teacher.model)
    known = [f"commit {teacher.revision}"] if teacher.revision else []
    known += [f"license {teacher.license}" if teacher.license else "license unknown"]
    name = [] if teacher.architecture == teacher.source else [teacher.architecture]
    keeps_all = family_of(teacher.model).keeps_all
    again = "converted again from its softmax layers" if keeps_all else "other layers converted"
    return f"{teacher.source}: {', '.join([*name, *known])}\n" + (
        f"already converted by {older}: {again}\n" if older else ""
    )


def _describe_tokens(model: nn.Module, student: nn.Module) -> str:
    """Return the size of the images and the tokens, stage by stage, and of the student if it has others."""
    from ...models.families import depths, image_size, layout_of, sites
    from ...models.merges import describe_unequal

    height, width = image_size(model) or (0, 0)
    if len(depths(model)) > 1:
        head = f"images of {height}x{width}: stages of {_list_grids(model)} tokens\n"
        why = describe_unequal(model, student)
        if why:
            head += f"the student: stages of {_list_grids(student)} tokens\n"
            head += f"warning: {why}, so layers cannot be calibrated or aligned; images with even grids avoid it\n"
        return head + "\n"
    layout = layout_of(model, sites(model)[0])
    return f"images of {height}x{width}: {layout.num_tokens} tokens, {layout.num_prefix} of them prefix tokens\n\n"


def _list_grids(model: nn.Module) -> str:
    from ...models.families import sites

    grids = {site.stage: site.shape.geometry.grid for site in sites(model)}
    return ", ".join(f"{rows}x{columns}" for rows, columns in grids.values())


# The table of a conversion: for each layer its operator, its cost and its initial weights.

STARTS = {"all": "copied", "mlp": "attention fresh, rest copied", "none": "fresh"}
SETS = {"detection": "coco", "segmentation": "ade20k"}
"""Where the recovery of a detector or segmenter begins, which the user may change."""
KEPT = {"all": "copied", "mlp": "copied", "none": "fresh"}


def conversion_table(
    teacher: nn.Module, student: nn.Module, weights: str, calibration: str | None = None
) -> str:
    """Return a table of each layer's operator, new parameters, multiply-adds before and after, and initial weights.

    A merge that the plan made deformable has a row between its stages.
    If `calibration` describes calibration images, add the error of each layer before and after calibration.
    """
    from ...models.converted import choices_of, converted_layers
    from ...models.cost import attention_macs
    from ...models.families import depths, sites
    from ...models.merges import new_merges

    before, after = attention_macs(teacher), attention_macs(student)
    layers, choices, earlier = converted_layers(student), choices_of(student), choices_of(teacher)
    staged = len(depths(student)) > 1
    merges, measured = new_merges(teacher, student), calibration is not None
    stage, error = ["stage"] * staged, ["error"] * measured
    rows = [["layer", *stage, "operator", "new parameters", "map MACs", "", *error, "weights"]]
    for site in sites(student):
        merge = merges.pop(site.stage, None)
        if merge is not None:
            place = ["merge", f"{site.stage} > {site.stage + 1}", DEFORMABLE]
            rows.append([*place, f"{_count(merge):,}", "-", "", *(["-"] * measured), "fresh"])
        index, layer = site.index, layers.get(site.index)
        changed = choices[index] != earlier[index]
        new = _count(layer.operator) if layer is not None else 0
        costs = [as_number(before[index]), ""]
        if changed:
            costs = [f"{costs[0]} -> {as_number(after[index])}", as_percent(after[index], before[index])]
        start = "-" if layer is None and changed else (STARTS if changed else KEPT)[weights]
        place = [str(index), *([str(site.stage + 1)] * staged), str(choices[index])]
        errors = [format_error(layer)] * measured
        rows.append([*place, f"{new:,}" if new else "-", *costs, *errors, start])
    note = calibration_note("timm's layer" if staged else "softmax", str(calibration)) * measured
    right = (0, *([1] * staged), 2 + staged, 4 + staged)
    return (
        aligned(rows, right)
        + note
        + fit_notes(layers)
        + _format_totals(teacher, student, sum(before), sum(after))
    )


def _format_totals(teacher: nn.Module, student: nn.Module, before: int, after: int) -> str:
    from ...models.converted import new_parameters
    from ...models.cost import other_macs

    whole = before + other_macs(teacher), after + other_macs(student)
    new = sum(parameter.numel() for parameter in new_parameters(student))
    return "\n".join(
        [
            "",
            f"attention maps: {as_number(before)} -> {as_number(after)} MACs an image ({as_percent(after, before)})",
            f"whole model:    {as_number(whole[0])} -> {as_number(whole[1])} MACs ({as_percent(whole[1], whole[0])}), "
            f"{_count(teacher):,} -> {_count(student):,} parameters, {new:,} of them new",
            "",
        ]
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def calibration_note(reference: str, calibration: str) -> str:
    """Return the lines below a table that explain its errors."""
    return (
        f"\nerror: of the layer's output against {reference} on {calibration}, before -> after calibration;\n"
        "one number where calibration changed nothing (the error of a fitted operator is that after its fit)\n"
    )


def format_error(layer: ConvertedAttention | None) -> str:
    """Return the error before and after calibration; one number where it is the same."""
    if layer is None or layer.calibration is None:
        return "-"
    before, after = (f"{error:.3f}" for error in layer.calibration)
    return after if before == after else f"{before} -> {after}"


def fit_notes(layers: Mapping[int, ConvertedAttention]) -> str:
    """Return a line for each layer that was fitted, with its measures before and after; none without such layers."""
    found = [f"fit of layer {index}: {layer.fit}\n" for index, layer in layers.items() if layer.fit]
    return "".join(["\n", *found] if found else [])


def as_number(value: int) -> str:
    """Return a number of multiply-adds in three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def as_percent(value: int, whole: int) -> str:
    """Return a part of a whole in percent."""
    return f"{100 * value / whole:.0f} %"
