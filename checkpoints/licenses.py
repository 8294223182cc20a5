"""Find the license of a student: it carries the license of the weights it was made from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.errors import CheckpointError, Json, JsonDict

LIST = "https://huggingface.co/docs/hub/repositories-licenses"
_HUB = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community "
    "h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openmdw-1.0 openrail openrail++ osl-3.0 other pddl "
    "postgresql unlicense wtfpl zlib"
)
HUB = frozenset(_HUB.split())
"""Identifiers that a card may state as its `license`."""
_NAMED = (
    "dinov3-license seer-license cvnets-license mobileone-license fastvit-license nvidia-open-model-license "
    "sapiens2-license qwen-community-1.0"
)
NAMED = frozenset(_NAMED.split())
"""Not on the hub's list: a card says `license: other` and `license_name`."""
LINKS = {"dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license"}
UNKNOWN = ("", "unknown", "none")


def normalize(license: str | None) -> str | None:
    """Return the hub's spelling of an identifier (`Apache-2.0`, `GPL-3.0-or-later`, `cc0`); None if it is unknown."""
    name = "-".join(str(license or "").lower().split())
    name = re.sub(r"^(l?gpl-.*|agpl-.*)-(only|or-later)$", r"\1", name)
    name = re.sub(r"^cc0$", "cc0-1.0", name)
    return None if name in UNKNOWN else name


def carried(*licenses: str | None) -> str | None:
    """Return the license that all weights of a student are under; None if that of any of them is unknown.

    Raises CheckpointError: they are under different licenses.
    """
    names = dict.fromkeys(map(normalize, licenses))
    if None in names or not names:
        return None
    if len(names) > 1:
        raise CheckpointError(
            f"the student is made from weights under {' and '.join(map(str, names))}: choose with --license and "
            "--confirm_license"
        )
    return next(iter(names))


def check_named(
    named: str, *sources: str | None, confirmed: bool = False, flag: str = "--license"
) -> str | None:
    """Return the identifier of the license that the user named, for a student of weights under `sources`.

    `flag` is where the user wrote it. None if the user says `unknown`.

    Raises CheckpointError: there is no such identifier; and unless it is `confirmed`: the weights are under another
    license, or theirs is unknown.
    """
    name, known = normalize(named), [normalize(source) for source in sources]
    if name is not None and name not in {*HUB, *NAMED, *known}:
        nearest = difflib.get_close_matches(name, sorted(HUB | NAMED), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise CheckpointError(
            f"{flag} {named!r} is no license identifier of the hub: {hint}{LIST} lists them, and `other` is one"
        )
    for source in () if confirmed else known:
        if source is None:
            raise CheckpointError(
                f"{flag} is {name or 'unknown'}, but the license of the weights that the student is made from is not "
                "known: look where they come from, then add --confirm_license"
            )
        if source != name:
            raise CheckpointError(
                f"{flag} {name or 'unknown'} is not {source}, the license of the weights that the student is made "
                f"from: name {source}, or add --confirm_license if it may be under another one"
            )
    return name


def check_shareable(license: str | None, *, confirmed: bool) -> None:
    """Raise CheckpointError for a license that forbids sharing derivatives, unless it is `confirmed`."""
    if not confirmed and "-nd-" in (normalize(license) or ""):
        raise CheckpointError(
            f"{license} forbids sharing derivatives, and this student may be one: ask the owner of the weights, then "
            "add --confirm_license"
        )


def card_fields(license: str | None) -> dict[str, str]:
    """Return `license`, and `license_name` and `license_link` of one that the hub does not list, for a card's head."""
    name = normalize(license)
    if name is None or name in HUB:
        return {} if name is None else {"license": name}
    link = {"license_link": LINKS[name]} if name in LINKS else {}
    return {"license": "other", "license_name": name, **link}


# Remove from a student's config.json what others must not see: paths of this machine.

PATH_KEYS = ("source", "init", "data_path", "stage", "output_dir", "cache")
"""Settings that may hold a path, relative ones included."""
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_BEGIN = r"(?:~[\w-]*/|\.{1,2}/|/|[A-Za-z]:[\\/]|\\\\)"
_ABSOLUTE = re.compile(r"(?:file:/*|local-dir:)?" + _BEGIN)
_INSIDE = re.compile(r"(?<![\w.:/\\-])(?:~[\w-]*/|/|[A-Za-z]:[\\/])[^\s\"'<>|:,;]+")


def public(config: Json) -> JsonDict:
    """Return a copy of a config in which each path is its last component."""
    return {key: _public(value, key) for key, value in config.items()}


def public_text(text: str, key: str = "") -> str:
    """Return the text without folders: `local-dir:/home/me/runs/a` as `local-dir:a`; a hub name as it is.

    `key` is the setting that the text stands in.
    """
    if text.startswith(_HUB_PREFIXES):
        return text
    if _ABSOLUTE.match(text) or (key in PATH_KEYS and re.search(r"[/\\]", text)):
        prefix = "local-dir:" if text.startswith("local-dir:") else ""
        return prefix + _last(text.removeprefix(prefix))
    return _INSIDE.sub(lambda found: _last(found[0]), text)


def _public(value: Any, key: str) -> Any:
    if isinstance(value, str):
        return public_text(value, key)
    if isinstance(value, Mapping):
        return {name: _public(part, name) for name, part in value.items()}
    return [_public(part, key) for part in value] if isinstance(value, (list, tuple)) else value


def _last(path: str) -> str:
    """Return the last component; for an address, without its query, which may hold a key."""
    path = path.partition("?")[0] if "://" in path else path
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


# Describe the train modes in recorded recipes, so that a student can be read without the package's engine.


@dataclass(frozen=True)
class RecordedMode:
    """The effect of a mode on a student."""

    words: str
    transfers: bool = False
    """Whether it read the section `transfer`."""
    matches: bool = False
    """Whether it read the section `align`."""


MODES = {
    "transfer": RecordedMode("transfer of attention from a frozen teacher", transfers=True),
    "align": RecordedMode(
        "alignment of each converted layer with a frozen teacher's, on the teacher's own inputs", matches=True
    ),
    "finetune": RecordedMode("fine-tuning"),
    "scratch": RecordedMode("training from scratch, without a teacher"),
    "pretrain": RecordedMode("masked autoencoding, without labels; these are the weights of the encoder"),
}
"""By the value of `mode`."""
_UNKNOWN = RecordedMode("")


def recorded_mode(recipe: Json) -> RecordedMode:
    """Return the effect of the recipe's mode; empty for an unknown mode."""
    return MODES.get(str(recipe.get("mode")), _UNKNOWN)
