"""Run the command, as `graftvit` and as `python -m graftvit.launch`, which launchers such as torchrun start."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `cli.main`. Ctrl-C while it is imported ends in the same way as afterwards."""
    try:
        from .launcher import collect_seldom

        collect_seldom()
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("graftvit: stopped by Ctrl-C\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
