"""Commands in what we say, as they can be pasted into a shell."""

from __future__ import annotations

import shlex


def hint(*words: object) -> str:
    """Returns `graftvit WORDS`, each word quoted where a shell would take it apart."""
    return shlex.join(["graftvit", *map(str, words)])
