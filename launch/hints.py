"""Commands in messages, quoted so that they can be pasted into a shell."""

from __future__ import annotations

import shlex


def hint(*words: object) -> str:
    """Return `graftvit WORDS` with each word quoted for a shell."""
    return shlex.join(["graftvit", *map(str, words)])
