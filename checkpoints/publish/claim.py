"""Find the license of a published student: from its weights, the user and an existing card."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCard

from ...models.errors import CheckpointError, Json
from ..licenses import NAMED, carried, check_named, check_shareable, normalize
from ..provenance import KEY, licenses
from .card_text import section


@dataclass(frozen=True)
class Claim:
    """A license and what it rests on."""

    license: str | None
    """Hub identifier, None where it is unknown."""
    sources: tuple[str | None, ...]
    """Of the weights that the student was made from; None for an unknown one."""
    named: bool
    """Whether the user named it."""
    confirmed: bool
    """Whether the user confirmed that it may be laxer than `sources`."""


def claim_license(config: Json, named: str | None, *, confirmed: bool) -> Claim:
    """Return the license of a student with this config.json: the `named` one, else the one that it carries.

    Raises CheckpointError: as `carried`, `check_named` and `check_shareable`.
    """
    sources = _sources(config)
    for source in sources:
        check_shareable(source, confirmed=confirmed)
    if named is None:
        return Claim(carried(*sources), sources, named=False, confirmed=confirmed)
    license = check_named(named, *sources, confirmed=confirmed)
    return Claim(license, sources, named=True, confirmed=confirmed)


def license_of_card(card: str, claim: Claim, place: str) -> str | None:
    """Return the license of a student whose card somebody wrote. `place` says which card it is.

    Raises CheckpointError: its head is no YAML; and unless it is confirmed: it names no license although the
    student carries one, a laxer one, or another one than the user does.
    """
    found = _stated(card, place, {*NAMED, *claim.sources})
    flag = f"the license in {place}"
    if not found:
        if claim.license is None or claim.confirmed:
            return claim.license
        raise CheckpointError(
            f"{place} names no license, and the student is under {claim.license}: add `license: {claim.license}` to "
            "its head, or add --confirm_license"
        )
    names = [check_named(text, *claim.sources, confirmed=claim.confirmed, flag=flag) for text in found]
    if claim.named and claim.license not in names:
        raise CheckpointError(
            f"{flag} is {' and '.join(map(str, names))}, but the student would be pushed under {claim.license}: name "
            "the same in both, with --license and in the head of the card"
        )
    return claim.license if claim.named else names[0]


def _sources(config: Json) -> tuple[str | None, ...]:
    """Return what the config records about the weights that the student was made from.

    The license of the weights themselves answers for an origin that is unknown, for the writer knew it.
    """
    origins = [normalize(license) for license in licenses(section(config, KEY))]
    own = normalize(section(config, "pretrained_cfg").get("license"))
    return tuple(origins) if own is None else (own, *(license for license in origins if license))


def _stated(card: str, place: str, known: Collection[str | None]) -> list[str]:
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"the head of {place} is damaged: {error}") from error
    stated = data.get("license") or []
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated])]
    other = normalize(str(data.get("license_name") or ""))
    return [other if name == "other" and other is not None and other in known else name for name in names]
