"""timm folders, on this disk or on the hub: config.json with the architecture, and one weights file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from timm.models._hub import load_model_config_from_path

from ..models.errors import CheckpointError
from .build import known_fields
from .files import read_file
from .formats import read_weights
from .hub import commit_of, download, try_download
from .sources import FileSource, FolderSource, HubSource
from .weights import Weights

CONFIG = "config.json"
WEIGHTS_NAMES = (
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip


def read_folder(source: FolderSource) -> Weights:
    """The model of a timm folder, or of a run folder (its `student/`, `student_ema/`, else its last state).

    Raises CheckpointError: neither is there, or the files are damaged.
    """
    folder = source.path
    if (folder / CONFIG).is_file():
        return _read(folder, lambda name: _existing(folder / name), str(folder))
    exported = folder / ("student" if source.part == "student" else "student_ema")
    if (exported / CONFIG).is_file():
        return read_folder(FolderSource(exported, "student"))
    state = folder / "checkpoints" / "last.safetensors"
    if state.is_file():
        return read_weights_file(FileSource(state, source.part))
    raise CheckpointError(
        f"the folder {folder} has no {CONFIG} (a timm folder) and no {exported.name}/ or checkpoints/ (a run)"
    )


def read_hub(source: HubSource) -> Weights:
    """The model of a hub repository in timm's layout, at `revision` or at the newest commit.

    Raises CheckpointError as `hub.explained`, or as `read_folder`.
    """
    name, revision = source.repository, source.revision
    config = download(name, CONFIG, revision)
    # The commit of the first file, so that all files are of one commit.
    commit = commit_of(config) or revision
    weights = _read(config.parent, lambda file: try_download(name, file, commit), f"hf-hub:{name}")
    return dataclasses.replace(weights, revision=commit)


def read_weights_file(source: FileSource) -> Weights:
    """The weights in one file. Raises CheckpointError as `read_file` and `read_weights`."""
    return read_weights(read_file(source.path), source.part)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _read(folder: Path, find: Callable[[str], Path | None], origin: str) -> Weights:
    try:
        config, architecture, model_args = load_model_config_from_path(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "is damaged or not timm's: it names no architecture"
        raise CheckpointError(f"{folder / CONFIG} {reason}") from error
    named = config.get("hf_hub_filename")
    names = (named, *WEIGHTS_NAMES) if named else WEIGHTS_NAMES
    path = next((path for path in map(find, names) if path), None)
    if path is None:
        raise CheckpointError(f"{origin} has a {CONFIG} but no weights: none of {', '.join(WEIGHTS_NAMES)}")
    weights = read_weights_file(FileSource(path, "student"))
    known = known_fields(config)
    if not known.get("license"):
        known["license"] = _card_licence(find("README.md"))
    return Weights(weights.tensors, origin, f"a timm folder ({path.name})", architecture, model_args, known)


def _card_licence(card: Path | None) -> str | None:
    """The licence that a model card states in its YAML head."""
    if card is None:
        return None
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None
    licence = data.to_dict().get("license")
    return str(licence) if licence else None
