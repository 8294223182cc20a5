"""Questions about a path that anybody may have typed: a name that no file can have is not there, and no error.

`Path.exists` raises for a name with a NUL or one that is too long; the functions of `os.path` do not.
"""

from __future__ import annotations

import os
from pathlib import Path


def is_there(path: str | Path) -> bool:
    """Whether a file or folder of that name exists."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | Path) -> bool:
    """Whether it is a file."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether it is a folder."""
    return os.path.isdir(path)  # noqa: PTH112
