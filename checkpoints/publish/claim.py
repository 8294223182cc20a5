"""Under which licence a student is published: what its weights carry, what the user names, what a card says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ...models.errors import CheckpointError
from ..licences import CONDITIONS, carried, check_named, check_shareable, normal
from ..provenance import KEY, licences
from .words import section


@dataclass(frozen=True)
class Claim:
    """A licence and what it rests on."""

    licence: str | None
    """Hub identifier, None where it is unknown."""
    sources: tuple[str | None, ...]
    """Of the weights that the student was made from; None for an unknown one."""
    named: bool
    """Whether the user named it."""
    confirmed: bool
    """Whether the user confirmed that it may be laxer than `sources`."""


def claim_licence(config: Mapping[str, Any], named: str | None, *, confirmed: bool) -> Claim:
    """The licence of a student with this config.json: the one that is `named`, else the one that it carries.

    Raises CheckpointError: as `carried`, `check_named` and `check_shareable`.
    """
    sources = _sources(config)
    for source in sources:
        check_shareable(source, confirmed=confirmed)
    if named is None:
        return Claim(carried(*sources), sources, named=False, confirmed=confirmed)
    licence = check_named(named, *sources, confirmed=confirmed)
    return Claim(licence, sources, named=True, confirmed=confirmed)


def licence_of_card(card: str, claim: Claim, place: str) -> str | None:
    """The licence of a student whose card somebody wrote. `place` says which card it is.

    Raises CheckpointError: its head is no YAML; and unless it is confirmed: it names no licence although the
    student carries one, a laxer one, or another one than the user does.
    """
    found = _stated(card, place)
    flag = f"the licence in {place}"
    if not found:
        if claim.licence is None or claim.confirmed:
            return claim.licence
        raise CheckpointError(
            f"{place} names no licence, and the student is under {claim.licence}: add `license: {claim.licence}` to "
            "its head, or add --confirm_licence"
        )
    names = [check_named(text, *claim.sources, confirmed=claim.confirmed, flag=flag) for text in found]
    if claim.named and claim.licence not in names:
        raise CheckpointError(
            f"{flag} is {' and '.join(map(str, names))}, but the student would be pushed under {claim.licence}: name "
            "the same in both, with --licence and in the head of the card"
        )
    return claim.licence if claim.named else names[0]


def _sources(config: Mapping[str, Any]) -> tuple[str | None, ...]:
    """What the config records of the weights that the student was made from.

    The licence of the weights themselves answers for an origin that is unknown, for the writer knew it.
    """
    origins = [normal(licence) for licence in licences(section(config, KEY))]
    own = normal(section(config, "pretrained_cfg").get("license"))
    return tuple(origins) if own is None else (own, *(licence for licence in origins if licence))


def _stated(card: str, place: str) -> list[str]:
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"the head of {place} is damaged: {error}") from error
    stated = data.get("license") or []
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated])]
    other = normal(str(data.get("license_name") or ""))
    return [other if name == "other" and other in CONDITIONS else name for name in names]
