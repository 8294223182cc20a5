"""Run the command, as `graftvit` and as `python -m graftvit.launch`, which launchers such as torchrun start."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `cli.main` in a process that ends with it. Ctrl-C while it is imported ends in the same way as afterwards."""
    try:
        from .garbage import collect_seldom, without_clearing

        collect_seldom()
        return without_clearing(_command)
    except KeyboardInterrupt:
        sys.stderr.write("graftvit: stopped by Ctrl-C\n")
        return 130


def _command() -> int:
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
