"""`graftvit train`: resolve the configuration, show it or the plan, or run it."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...models.errors import RunFailedError, counted
from ...transfer.config import RunConfig
from ...transfer.engine.stages import (
    Stage,
    chain,
    check_each,
    check_stages,
    check_students,
    train_stages,
    train_students,
)
from ...transfer.first_checks import check_first, check_head, check_places
from ..flags import command_parser, parse_command
from ..load_config import Setting, dump_config, load_config, load_stages, load_students, read_recipe
from ..progress import SCORES
from ..say import say, say_aside

if TYPE_CHECKING:
    from ...transfer.engine.train import RunResult

EXAMPLES = (
    "graftvit train attention_distill_vit_large --data_path /data/imagenet --output_dir runs/distill",
    "graftvit train attention_copy_vit_base --data_path /data/imagenet --blr 5e-4 --epochs 50",
    "graftvit train cifar10_distill --data_path /data/cifar transfer.layers=first:6 --dry_run",
    "graftvit train --mode finetune --model vit_small_patch16_224 --init vit_small_patch16_224.dino "
    "--dataset torch/cifar10 --data_path /data/cifar",
    "graftvit train --mode pretrain --dataset torch/cifar10 --data_path /data/cifar --model vit_small_patch16_224 "
    "--img_size 32 student.model_args.patch_size=4 --epochs 400",
    "graftvit train mine.yaml --print_config",
    "torchrun --nproc_per_node 8 -m graftvit.launch train attention_distill_vit_large "
    "--data_path /data/imagenet",
)


def run(argv: list[str]) -> int:
    """Train with the settings of the recipe or YAML file and of the flags."""
    usage = "[RECIPE_OR_YAML] [--flag value ...] [section.key=value ...]"
    parser = command_parser(
        "train",
        "Train a student. Settings come from the defaults, then the recipe or YAML file, then the flags "
        "and section.key=value words, in this order.",
        EXAMPLES,
        usage,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE_OR_YAML",
        help="a name from `graftvit list recipes`, a YAML file or a run folder",
    )
    parser.switch("--print_config", "print the resolved configuration as YAML and stop")
    parser.switch("--dry_run", "print the resolved plan and a memory estimate and stop")
    arguments, settings = parse_command(parser, argv)
    recipe = None if arguments.recipe is None else read_recipe(arguments.recipe)
    if recipe is not None and recipe.stages:
        return _run_stages(arguments, settings)
    if recipe is not None and recipe.students:
        return _run_students(arguments, settings)
    config = load_config(arguments.recipe, settings)
    if arguments.print_config:
        say(dump_config(config))
        return 0
    check_first(config)  # before torch is imported
    if arguments.dry_run:
        from ..plan_text import describe_plan

        say(describe_plan(config))
        return 0
    check_places(config)
    return _train(config)


def _run_stages(arguments: argparse.Namespace, settings: Sequence[Setting]) -> int:
    """Show the stages of a recipe, or run them one after another."""
    stages = load_stages(arguments.recipe, settings)
    shown = chain(stages)
    if arguments.print_config:
        say("---\n".join(f"# stage {stage.name}\n{dump_config(stage.config)}" for stage in shown))
        return 0
    if arguments.dry_run:
        for stage in check_stages(stages):
            check_head(stage.config)
        say("".join(f"stage {stage.name}: mode {stage.config.mode}, {_describe_length(stage.config)}, "
                                 f"in {stage.config.output_dir}\n" for stage in shown))  # fmt: skip
        from ..plan_text import describe_plan

        say(f"\nthe first stage, {shown[0].name}:\n{describe_plan(shown[0].config)}")
        # A later conversion is described on a fresh model: its student is not there yet.
        for own, stage in zip(stages[1:], shown[1:], strict=True):
            if stage.config.student.plan is not None:
                config = own.config.model_copy(update={"output_dir": stage.config.output_dir})
                say(f"\nthe stage {stage.name}, which converts the student:\n{describe_plan(config)}")
        return 0
    done = train_stages(stages)
    last = list(done.results.values())[-1]
    for name, result in done.results.items():
        say(f"{name}: {_describe_result(result.metrics)}{result.output_dir}\n")
    return 0 if done.signal is None else _report_stop(last, done.signal, shown[0].config)


def _run_students(arguments: argparse.Namespace, settings: Sequence[Setting]) -> int:
    """Show the students of a recipe, or run them side by side."""
    students = load_students(arguments.recipe, settings)
    shown = check_students(students)
    if arguments.print_config:
        say("---\n".join(f"# student {name}\n{dump_config(config)}" for name, config in shown.items()))
        return 0
    if arguments.dry_run:
        from ..plan_text import describe_plan

        plans: list[str] = []
        runs = [Stage(name, config) for name, config in shown.items()]
        check_each(runs, lambda config: plans.append(describe_plan(config)), "student")
        say("\n".join(f"the student {name}:\n{plan}" for name, plan in zip(shown, plans, strict=True)))
        return 0
    for config in shown.values():
        check_places(config)
    done = train_students(students)
    for name, result in done.results.items():
        say(f"{name}: {_describe_result(result.metrics)}{result.output_dir}\n")
    if done.signal is not None:
        last = [each for each in done.results.values() if each.signal is not None][-1]
        return _report_stop(last, done.signal, next(iter(shown.values())))
    if done.failures:
        raise RunFailedError("; ".join(f"student {name}: {error}" for name, error in done.failures.items()))
    return 0


def _describe_result(metrics: Mapping[str, float]) -> str:
    """Describe the student of a stage: its accuracy, or its distance from the teacher."""
    if "test_top1" in metrics:
        return f"top-1 {metrics['test_top1']:.2f} %, "
    for name, words in SCORES.items():
        if f"test_{name}" in metrics:
            return f"{words} {metrics[f'test_{name}']:.3f}, "
    error = metrics.get("test_relative_error")
    return "" if error is None else f"relative error {error:.4f}, "


def _describe_length(config: RunConfig) -> str:
    steps = config.optim.max_steps
    return counted(config.optim.epochs, "epoch") if steps is None else counted(steps, "step")


def _train(config: RunConfig) -> int:
    # First: to register operators, torch asks the file system for every module that was imported before.
    from ...models.attention import fused  # noqa: F401
    from ...transfer.engine.train import train

    result = train(config)
    return 0 if result.signal is None else _report_stop(result, result.signal, config)


def _report_stop(result: RunResult, number: int, config: RunConfig) -> int:
    """Report which signal stopped a run and how to continue it; return the exit code."""
    with_flag = "" if config.engine.resume == "auto" else " with --resume auto"
    name = signal.Signals(number).name
    done = (
        f"after step {result.steps}, state saved in {result.output_dir}"
        if result.steps
        else "before its first step"
    )
    say_aside(f"graftvit: stopped by {name} {done}; the same command{with_flag} continues from there\n")
    return 128 + number
