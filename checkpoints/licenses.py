"""Licences of weights: what each asks of whoever passes the weights on, and which one a student must carry."""

from __future__ import annotations

import difflib
import re

from ..models.errors import CheckpointError

NOTICE, CHANGES = "keep the notice", "state what was changed"
ALIKE, NO_COMMERCE, NO_DERIVATIVES = "share alike", "no commercial use", "share no derivatives"
USES = "pass the use restrictions on"

_BY = (NOTICE, CHANGES)
_OPEN = {
    (): "cc0-1.0 pddl unlicense wtfpl",
    (NOTICE,): "mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib bsl-1.0 ncsa postgresql",
    _BY: "apache-2.0 afl-3.0 artistic-2.0 ecl-2.0 odc-by etalab-2.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "open-mdw openmdw-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0",
    (*_BY, ALIKE): "cc-by-sa-3.0 cc-by-sa-4.0",
    (*_BY, NO_COMMERCE): "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0",
    (*_BY, NO_COMMERCE, ALIKE): "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    (*_BY, NO_DERIVATIVES): "cc-by-nd-4.0",
    (*_BY, NO_COMMERCE, NO_DERIVATIVES): "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
    (*_BY, USES): "openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m",
}
"""What is asked: the identifiers that ask it. Versions of one licence count as the same."""
_CHAINS = ("lgpl-2.1 gpl-2.0", "lgpl-3.0 gpl-3.0 agpl-3.0")
"""Copyleft: each asks all that those before it ask."""
_OWN_TERMS = (
    "gpl lgpl lgpl-lr gfdl mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 osl-3.0 ms-pl lppl-1.3c ofl-1.1 odbl "
    "cdla-sharing-1.0 cc c-uda llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma apple-ascl "
    "other"
)
"""On the hub's list, with terms like no other's."""
_OWN_TERMS_NO_COMMERCE = (
    "apple-amlr deepfloyd-if-license fair-noncommercial-research-license h-research intel-research"
)
_NAMED = (
    "dinov3-license seer-license cvnets-license mobileone-license fastvit-license nvidia-open-model-license "
    "sapiens2-license qwen-community-1.0"
)
"""Not on the hub's list: a card says `license: other` and `license_name`."""
_LINKS = {"dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license"}
LIST = "https://huggingface.co/docs/hub/repositories-licenses"
_UNKNOWN = ("", "unknown", "none")


def _own(*names: str) -> frozenset[str]:
    return frozenset({NOTICE, CHANGES, *(f"the terms of {name}" for name in names)})


def _table() -> dict[str, frozenset[str]]:
    table = {name: frozenset(asked) for asked, names in _OPEN.items() for name in names.split()}
    for chain in map(str.split, _CHAINS):
        table |= {name: _own(*chain[: place + 1]) for place, name in enumerate(chain)}
    table |= {name: _own(name) for name in (_OWN_TERMS + " " + _NAMED).split()}
    return table | {name: _own(name) | {NO_COMMERCE} for name in _OWN_TERMS_NO_COMMERCE.split()}


CONDITIONS = _table()
"""What each licence asks, by its identifier on the Hugging Face hub. Not legal advice."""


def normal(licence: str | None) -> str | None:
    """The hub's way to write an identifier (`Apache-2.0`, `GPL-3.0-or-later`, `cc0`); None for an unknown licence."""
    name = "-".join(str(licence or "").lower().split())
    name = re.sub(r"^(l?gpl-.*|agpl-.*)-(only|or-later)$", r"\1", name)
    name = re.sub(r"^cc0$", "cc0-1.0", name)
    return None if name in _UNKNOWN else name


def conditions(licence: str) -> frozenset[str]:
    """What a licence asks; of one that is not in the table, its own terms."""
    name = normal(licence) or ""
    return CONDITIONS.get(name, _own(name))


def carried(*licences: str | None) -> str | None:
    """The strictest of the licences of what a student was made from, which it must carry.

    None where there is none, and where one of them is unknown, for it may be the strictest.

    Raises CheckpointError: two that ask different things, so that neither holds for both.
    """
    names = [normal(licence) for licence in licences]
    known = [name for name in names if name is not None]
    if len(known) < len(names) or not known:
        return None
    asked = frozenset[str]().union(*map(conditions, known))
    strictest = [name for name in known if conditions(name) == asked]
    if not strictest:
        raise CheckpointError(
            f"the student is made from weights under {' and '.join(dict.fromkeys(known))}, and neither licence "
            "asks all that the others ask: choose with --licence and --confirm_licence"
        )
    return strictest[0]


def check_named(
    named: str, *licences: str | None, confirmed: bool = False, flag: str = "--licence"
) -> str | None:
    """The identifier of the licence that the user named, for a student of weights under `licences`.

    `flag` is what the user wrote it in, for the sentence. None where the user says `unknown`.

    Raises CheckpointError: there is no such identifier; and unless it is `confirmed`: it does not ask all
    that one of `licences` asks, or one of them is not known.
    """
    name = normal(named)
    if name is not None and name not in CONDITIONS:
        nearest = difflib.get_close_matches(name, CONDITIONS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise CheckpointError(
            f"{flag} {named!r} is no licence identifier of the hub: {hint}{LIST} lists them, and `other` is one"
        )
    for licence in () if confirmed else licences:
        _check_pair(name, normal(licence), flag)
    return name


def check_shareable(licence: str | None, *, confirmed: bool) -> None:
    """Raises CheckpointError for a licence that lets nobody share derivatives, unless it is `confirmed`."""
    if licence is not None and NO_DERIVATIVES in conditions(licence) and not confirmed:
        raise CheckpointError(
            f"{licence} lets nobody share what is made from weights under it, and a student may be that: ask "
            "their owner, then add --confirm_licence"
        )


def card_fields(licence: str | None) -> dict[str, str]:
    """`license`, and for one that the hub does not list `license_name` and `license_link`, of a card's head."""
    name = normal(licence)
    if name is None:
        return {}
    if name in CONDITIONS and name not in _NAMED.split():
        return {"license": name}
    link = {"license_link": _LINKS[name]} if name in _LINKS else {}
    return {"license": "other", "license_name": name, **link}


def _check_pair(name: str | None, source: str | None, flag: str) -> None:
    if source is None:
        raise CheckpointError(
            f"{flag} is {name or 'unknown'}, but the licence of the weights that the student is made from is not "
            "known: look where they come from, then add --confirm_licence"
        )
    dropped = sorted(conditions(source) - (conditions(name) if name else frozenset()))
    if dropped:
        laxer = name is not None and conditions(name) < conditions(source)
        relation = f"is laxer than {source}" if laxer else f"is not {source}"
        raise CheckpointError(
            f"{flag} {name or 'unknown'} {relation}, the licence of the weights that the student is made from: it "
            f"drops {_quoted(dropped)}; name {source}, or add --confirm_licence if their owner allows it"
        )


def _quoted(words: list[str]) -> str:
    return " and ".join(f"{word!r}" for word in words)
