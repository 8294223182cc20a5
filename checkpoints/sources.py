"""Parse where weights come from, as the user writes it, into a typed source."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..models.errors import CheckpointError
from .files import at_home, is_folder, is_there, is_url, near_path

SAFE_SUFFIXES = (".safetensors",)
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (*SAFE_SUFFIXES, *PICKLE_SUFFIXES, ".npz", ".onnx")
"""By these a path that is not there is told from a misspelt model name; what a file is, its bytes say."""
SYNTAX = (
    "a timm name (vit_large_patch16_224.mae), hf-hub:org/name[@revision], local-dir:path, "
    "or a weights file (.safetensors, .pth, .npz, .onnx, …)"
)
CONFIG = "config.json"
"""In the folder of a model; that of a run has none."""
STUDENTS = ("student", "student_ema")
"""The folders of a run that hold its models."""
Part = Literal["student", "teacher", "ema", "best", "last"]
"""One of several models. Of a run: `last`, as `student`, is the student as trained to the newest step, `ema` its moving
average there, `best` the model with the best score, which is the average where the run keeps one."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class TimmSource:
    """A model name of timm, with or without a tag."""

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face hub."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True)
class FolderSource:
    """A timm folder (config.json and weights) or the folder of a run; `part` picks one of the run's models.

    None is the part that such a source is used for, `last` of a run.
    """

    path: Path
    part: Part | None = None


@dataclass(frozen=True)
class FileSource:
    """A weights file; `part` picks one of the models in it, None the one that such files are used for."""

    path: Path
    part: Part | None = None


Source = TimmSource | HubSource | FolderSource | FileSource


def source_text(source: object) -> str:
    """Return a source as text. Raises CheckpointError: it is a model or another object, no path or name."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str):
            # A path is no name of a model of timm, even where one is called so.
            here = not isinstance(source, str) and os.sep not in text and is_there(text)
            return os.path.join(os.curdir, text) if here else text  # noqa: PTH118
    raise CheckpointError(
        f"source is a {type(source).__name__} and no path or name of weights; graftvit.save writes a model in memory"
    )


def check_there(text: str) -> None:
    """Raise CheckpointError for a source that is written in a wrong way, or a path that is not there. No torch here."""
    _parse_written(text)


def parse_source(text: str) -> Source:
    """Parse a source as the user gave it. A `Part` behind a path, such as `#ema`, picks one of the models in it.

    Raises CheckpointError: it is not of a known kind, the file or folder is not there, or timm has
    no such model; the sentence says what would be valid.
    """
    written = _parse_written(text)
    if written is not None:
        return written
    from timm.models import is_model, split_model_name_tag

    path, _ = split_part(text)
    if is_model(split_model_name_tag(text)[0]):
        if is_there(path / "config.json") or is_there(path / "config.yaml"):
            raise CheckpointError(
                f"{text!r} is both a model of timm and a folder here: write local-dir:{text} for the folder, or name "
                "one of timm's tags of it"
            )
        return TimmSource(text)
    if text and is_folder(path):
        return _folder(text, text)
    if text and is_there(path):
        return _file(text)
    raise CheckpointError(f"{text!r} is no source of weights: {_suggest(text)}")


def _parse_written(text: str) -> Source | None:
    """Return the source whose kind a prefix or a suffix tells; None for a timm name or another path."""
    prefix, colon, rest = text.partition(":")
    if colon and prefix in ("hf-hub", "hf_hub"):
        return _hub(rest, text)
    if is_url(rest if prefix == "local-dir" else text):
        raise CheckpointError(
            f"{text!r} is a URL, and weights are read from this machine or from the hub: fetch them first, or write "
            f"{SYNTAX}"
        )
    if colon and prefix == "local-dir":
        return _folder(rest, text)
    return _file(text) if split_part(text)[0].suffix.lower() in SUFFIXES else None


def _hub(name: str, text: str) -> HubSource:
    repository, at, revision = name.partition("@")
    if (
        repository.count("/") != 1
        or not all(repository.split("/"))
        or (at and not revision)
        or "@" in revision
    ):
        raise CheckpointError(
            f"{text!r} is not a hub name: write hf-hub:org/name or hf-hub:org/name@revision"
        )
    return HubSource(repository, revision or None)


def _folder(name: str, text: str) -> FolderSource:
    path, part = split_part(name)
    if not name or not is_there(path):
        run = is_there(path.parent / "config.yaml") or is_there(path.parent / "jobs")
        unfinished = run and path.name in STUDENTS
        why = f"the run in {path.parent} has not written it yet" if unfinished else _near(path)
        raise CheckpointError(f"{text!r}: there is no folder {str(path)!r}; {why}")
    if not is_folder(path):
        raise CheckpointError(
            f"{text!r}: {str(path)!r} is a file, and local-dir: takes a folder; leave the prefix out"
        )
    return FolderSource(path, part)


def _file(text: str) -> FileSource:
    path, part = split_part(text)
    if not is_there(path):
        raise CheckpointError(f"the weights file {str(path)!r} is not there; {_near(path)}")
    if is_folder(path):
        raise CheckpointError(f"the weights file {str(path)!r} is a folder; write local-dir: before it")
    return FileSource(path, part)


def _near(path: Path) -> str:
    return near_path(path) or "check the path"


def split_part(text: str) -> tuple[Path, Part | None]:
    """Return the path of a source, which may have a # in its name, and the part behind its last #."""
    path, _, word = text.rpartition("#")
    for part in PARTS:
        if part == word and path:
            return at_home(path), part
    return at_home(text), None


def _suggest(text: str) -> str:
    from timm.models import list_models, list_pretrained, split_model_name_tag

    base, tag = split_model_name_tag(text)
    near = near_path(split_part(text)[0])
    if "/" in text or ":" in text:
        return f"there is no such file or folder; {f'{near} Else ' if near else ''}write {SYNTAX}"
    names = list_pretrained() if tag else list_models()
    nearest = difflib.get_close_matches(text if tag else base, names, n=1, cutoff=0.6)
    model = f"did you mean {nearest[0]!r}?" if nearest else ""
    hint = f"{near} Or the model {nearest[0]!r}? " if near and nearest else f"{near or model} ".lstrip()
    return (
        f"{hint}{'Valid' if hint.strip() else 'valid'} is {SYNTAX}; `timm.list_pretrained()` names the models"
    )
