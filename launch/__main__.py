"""Run `python -m graftvit.launch`, for launchers that start a module: `torchrun -m graftvit.launch train ...`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
