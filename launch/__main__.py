"""The command itself, as `graftvit` and as `python -m graftvit.launch`, which launchers such as torchrun start."""

from __future__ import annotations

import sys


def main() -> int:
    """As `cli.main`; Ctrl-C while that is loaded ends no differently from one afterwards."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("graftvit: stopped by Ctrl-C\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
