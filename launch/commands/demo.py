"""`graftvit demo`: train teachers and students on digits or on photographs, on a CPU."""

from __future__ import annotations

from pathlib import Path

from ..flags import command_parser
from ..say import say


def run(argv: list[str]) -> int:
    """Run the demo and print the path of its report."""
    parser = command_parser(
        "demo",
        "Train two small teachers on handwritten digits or on Fashion-MNIST, one with all labels and one without "
        "any, then students with few labels: from scratch, fine-tuned, with copied and with distilled attention. Write "
        "a report. Finished cells are kept: repeat the command to continue a stopped demo.",
        [
            "graftvit demo --quick",
            "graftvit demo --output_dir /tmp/demo --processes 2",
            "graftvit demo --dataset fashion_mnist --download --quick",
        ],
    )
    parser.switch("--quick", "one seed instead of five, and shorter training of the teachers")
    parser.output_dir("the report's folder (default: demo, or demo_NAME for another --dataset)")
    text = "digits, which needs no files, or fashion_mnist: product photographs, 28 by 28 pixels"
    parser.flag("--dataset", text, default="digits", metavar="NAME")
    text = "folder of the images of --dataset (default: data in the report's folder, where those of Debian's "
    text += "dataset-fashion-mnist are unpacked)"
    parser.flag("--data_path", text, type=Path, metavar="DIR")
    parser.switch("--download", "download the images to that folder")
    text = "seeds of the students (default: 0 1 2 3 4)"
    parser.flag("--seeds", text, type=int, nargs="+", metavar="SEED")
    text = "cells at the same time (default: one per core); no effect on numbers"
    parser.flag("--processes", text, type=int, metavar="N")
    parser.flag("--threads", "threads of a cell; changes the rounding", type=int, default=1, metavar="N")
    arguments = parser.parse_args(argv)
    from ...transfer.analysis.demo import run_demo

    name = "demo" if arguments.dataset == "digits" else f"demo_{arguments.dataset}"
    report = run_demo(
        arguments.output_dir or Path(name),
        arguments.quick,
        dataset=arguments.dataset,
        data_path=arguments.data_path,
        download=arguments.download,
        seeds=arguments.seeds,
        processes=arguments.processes,
        threads=arguments.threads,
    )
    say(f"report: {report}\n")
    return 0
