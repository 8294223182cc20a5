"""Folders and hub repositories of transformers with a model that no key map turns into one of timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..models.errors import CheckpointError, Json
from .formats.transformers.hf_config import MODEL_TYPES
from .hub.download import commit_of, download, try_download
from .model_folders import CONFIG, read_card_license, read_config
from .paths import is_there
from .shards import INDEX_SUFFIX, read_shards
from .sources import FolderSource, HubSource, Source
from .weight_files import read_file

NAMES = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")


@dataclass(frozen=True)
class ForeignFolder:
    """A model of transformers as it lies on the disk."""

    origin: str
    folder: Path
    config: Json
    find: Callable[[str], Path | None]
    """Returns the path of a file by its name, or None."""
    revision: str | None = None

    @property
    def preprocessor(self) -> Json:
        """The settings of its image processor; empty without a file of them."""
        path = self.find("preprocessor_config.json")
        return {} if path is None else read_config(path)

    @property
    def license(self) -> str | None:
        """The license in its model card."""
        return read_card_license(self.find("README.md"))

    def read_tensors(self) -> dict[str, Tensor]:
        """Return its tensors, of safetensors files alone. Raises CheckpointError: there are none, or damaged ones."""
        for name in NAMES:
            path = self.find(name)
            if path is None:
                continue
            content = (
                read_shards(path, self.find) if name.endswith(INDEX_SUFFIX) else read_file(path, self.folder)
            )
            return dict(content.tree)
        raise CheckpointError(
            f"{self.origin} has a {CONFIG} and no {NAMES[0]}: a teacher of transformers is read from safetensors alone"
        )


def find_foreign(source: Source, revision: str | None) -> ForeignFolder | None:
    """Return the folder of a source whose config.json names a type that no key map knows, else None."""
    if isinstance(source, HubSource):
        source = replace(source, revision=revision or source.revision)
        name = source.repository
        config = download(name, CONFIG, source.revision)
        commit = commit_of(config) or source.revision
        made = ForeignFolder(
            f"hf-hub:{name}",
            config.parent,
            read_config(config),
            lambda file: try_download(name, file, commit),
            commit,
        )
    elif isinstance(source, FolderSource) and is_there(source.path / CONFIG):
        folder = source.path
        made = ForeignFolder(
            str(folder),
            folder,
            read_config(folder / CONFIG),
            lambda file: folder / file if is_there(folder / file) else None,
        )
    else:
        return None
    kind = made.config.get("model_type")
    if not isinstance(kind, str) or "architecture" in made.config or kind in MODEL_TYPES:
        return None
    if revision is not None and isinstance(source, FolderSource):
        raise CheckpointError(
            f"revision={revision!r} is of the hub, and {made.origin} is on this disk: leave it out"
        )
    return made
