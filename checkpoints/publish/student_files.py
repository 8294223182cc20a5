"""Collect what would go to the hub from a student's folder: files, card, license. Send nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor

from ...models.errors import CheckpointError, Json, JsonDict
from ..copying_students import refuse_unnamed
from ..model_folders import CONFIG
from ..provenance import KEY
from ..public import public
from ..regular_files import read_json, read_regular
from ..report import some
from ..safety.file_outline import outline
from ..shards import weight_map
from ..sources import PICKLE_SUFFIXES, STUDENTS
from .card import is_generated, student_card
from .card_text import DescribeTransfer, plain_transfer, section
from .claim import Claim, claim_license, license_of_card
from .sections import CardFacts

CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
"""Go up where they are there: some licenses ask that their text goes with the weights."""
WEIGHTS_PATTERN = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class UploadFile:
    """One file of the commit, from the disk or made here."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Upload:
    """A student that may be pushed."""

    facts: CardFacts
    config: Json
    """config.json, without paths of this machine and with the license."""
    claim: Claim
    files: tuple[UploadFile, ...]
    left_behind: tuple[str, ...]
    """What else lies in the folder."""
    card: str
    own_card: bool
    """Whether the card is the folder's own, written or edited by a person."""


def plan_upload(
    folder: Path | str,
    repository: str,
    *,
    license: str | None = None,
    confirm_license: bool = False,
    revision: str | None = None,
    dataset_name: str | None = None,
    describe_transfer: DescribeTransfer = plain_transfer,
) -> Upload:
    """Return what `push_student` would send; works without a network.

    Args:
        folder: a student folder: config.json and weights in safetensors.
        repository: `org/name` on the hub.
        license: hub identifier; by default the one that the student carries from the weights it was made from.
        confirm_license: the user has made sure that a laxer license, or one for unknown terms, may be named.
        revision: branch, main by default.
        dataset_name: what to call the data of the results in the card.
        describe_transfer: the card's rows for what was taken from the teacher.

    Raises CheckpointError: the folder holds no whole student, the name is invalid, a file is a link that leads
    out of the folder, or the license is refused.
    """
    _check_repository(repository)
    folder = Path(folder)
    config = _config(folder)
    refuse_unnamed(str(config["architecture"]), section(config, KEY), str(folder))
    weights = _weights(folder)
    claim = claim_license(config, license, confirmed=confirm_license)
    own = _own_card(folder)
    if own is not None:
        claim = replace(claim, license=license_of_card(own, claim, CARD))
    facts = CardFacts(
        repository,
        claim.license,
        revision=None if revision == "main" else revision,
        parameters=sum(map(_parameters, weights)),
        sharded=len(weights) > 1,
        dataset_name=dataset_name,
        describe_transfer=describe_transfer,
    )
    config = _published(config, claim.license)
    card = own if own is not None else student_card(config, facts)
    files = [UploadFile(path.name, path) for path in weights]
    files += [UploadFile(INDEX, _inside(folder, INDEX))] if facts.sharded else []
    files += [UploadFile(name, _inside(folder, name)) for name in TEXTS if (folder / name).is_file()]
    files.append(UploadFile(CONFIG, (json.dumps(config, indent=2) + "\n").encode()))
    files.append(UploadFile(CARD, card.encode()))
    names = {file.name for file in files}
    left = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in names)
    return Upload(facts, config, claim, tuple(files), tuple(left), card, own is not None)


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise CheckpointError(
            f"{repository!r} is no repository name: write org/name, of letters, digits, '-', '_' and '.'"
        )


def _config(folder: Path) -> JsonDict:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r} to push; check the path")
    if not (folder / CONFIG).is_file():
        runs = [name for name in STUDENTS if (folder / name / CONFIG).is_file()]
        hint = f"it is a run, push {folder / runs[0]}" if runs else "a finished run writes one"
        raise CheckpointError(f"{folder} is not a student folder, because it has no {CONFIG}: {hint}")
    config = read_json(_inside(folder, CONFIG))
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{folder / CONFIG} names no architecture: it is not that of a student")
    return config


def _weights(folder: Path) -> list[Path]:
    """Return the files with the weights, after checking each."""
    if (folder / WEIGHTS).exists():
        return [_inside(folder, WEIGHTS)]
    if (folder / INDEX).exists():
        index = weight_map(_inside(folder, INDEX))
        paths = [_inside(folder, name) for name in sorted(set(index.values()))]
        held = {name for path in paths for name in _described(path)}
        absent = sorted(index.keys() - held)
        if absent:
            raise CheckpointError(f"{folder / INDEX} lists {some(absent)}, which its files do not hold")
        return paths
    other = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    hint = f"; `graftvit checkpoint convert` makes one of {other[0]}" if other else ""
    raise CheckpointError(f"{folder} has no {WEIGHTS}, and nothing else goes up{hint}")


def _inside(folder: Path, name: str) -> Path:
    """Return a file of the folder. CheckpointError: it is not there, not a file, or a link that leads out."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is not there or not a file: the student is not whole")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link that leads out of its folder: put a copy in its place")
    return path


def _described(path: Path) -> dict[str, Tensor]:
    """Return the tensors without their numbers, from the header."""
    found = outline(path)
    if found.kind != "safetensors":
        raise CheckpointError(f"{path} is no safetensors file")
    return found.tree


def _parameters(path: Path) -> int:
    return sum(tensor.numel() for tensor in _described(path).values() if tensor.is_floating_point())


def _own_card(folder: Path) -> str | None:
    """Return the card of the folder if a person wrote or edited it."""
    if not (folder / CARD).exists():
        return None
    card = read_regular(_inside(folder, CARD))
    return None if is_generated(card) else card


def _published(config: Json, license: str | None) -> JsonDict:
    """config.json for others: no path of this machine, and the license that the card has."""
    shown = public(config) | {"model_args": config.get("model_args", {})}
    described = {key: value for key, value in section(shown, "pretrained_cfg").items() if key != "license"}
    return shown | {"pretrained_cfg": described | ({"license": license} if license else {})}
