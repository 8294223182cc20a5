"""`graftvit demo`: the whole story on digits, on a CPU, without a download."""

from __future__ import annotations

import sys
from pathlib import Path

from ...models.errors import ConfigError
from ..flags import command_parser


def run(argv: list[str]) -> int:
    """Run the demo and print where its report is."""
    parser = command_parser(
        "demo",
        "Pretrain a small teacher on scikit-learn's digits without labels, then students with "
        "few labels: from scratch, fine-tuned, with copied and with distilled attention. Writes a report.",
        ["graftvit demo --quick", "graftvit demo --output_dir /tmp/demo"],
    )
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="the report's folder (default: demo)"
    )
    arguments = parser.parse_args(argv)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ConfigError(f"--output_dir is {str(arguments.output_dir)!r}, which is a file; name a folder")
    from ...transfer.demo.run import run_demo

    report = run_demo(arguments.output_dir, arguments.quick)
    sys.stdout.write(f"report: {report}\n")
    return 0
