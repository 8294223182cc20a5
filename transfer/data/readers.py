"""What timm reads: tar files, torchvision's data sets and streams, with errors of one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data.dataset_factory import create_dataset

from ...models.errors import DataError, JsonDict
from ..config import DataConfig
from .hub import stream_columns

SHARDS = "shards-{0000..0009}.tar|50000"
HINTS = {
    "Dataset length is unknown": "; give --download, or read it with hfds/",
    "not found in info": f"; write an _info.json beside the shards, or name them and their images, as in data.{{split}}='{SHARDS}'",  # noqa: E501
    "num_samples not specified": f"; write the number of images behind the shards, as in data.{{split}}='{SHARDS}'",
}
"""What to do about an error of timm's readers, by words of it."""


def create(
    config: DataConfig,
    name: str,
    split: str,
    mode: str,
    *,
    training: bool,
    seed: int,
) -> Any:
    """timm's data set. Raises DataError with its reason, and what to do about it where that is known."""
    try:
        if name.startswith("wds/"):
            _check_shards(Path(str(config.data_path)))
        keys = _keys(config, name, split)
        return create_dataset(
            name,
            root=config.data_path,
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            seed=seed,
            input_img_mode=mode,
            **keys,
        )
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"data.dataset={name} needs a package that is missing: {error}") from error
    except (
        Exception
    ) as error:  # each reader fails in its own way: asserts, RuntimeError, errors of the network
        raise DataError(_sentence(config, name, split, error)) from error


def _check_shards(folder: Path) -> None:
    """DataError where a shard is a pipe or a device, which its reader would wait for."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.suffix in (".tar", ".json", ".yaml") and path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file, and shards are read from files")


def _keys(config: DataConfig, name: str, split: str) -> JsonDict:
    """timm's words for where a sample has its image and its label."""
    family = name.partition("/")[0].lower() if "/" in name else ""
    if family == "hfids":
        columns = stream_columns(config, split)
        return {"input_key": columns.image, "target_key": columns.label}
    if family == "wds":
        # timm calls the decoded image jpg, and looks for jpg, png and webp by itself
        kinds = (config.image_column or "jpg;jpeg;png;webp").split(";")
        return {"input_key": ";".join(dict.fromkeys([*kinds, "jpg"])), "target_key": config.label_column}
    if family == "tfds":
        return {"input_key": config.image_column, "target_key": config.label_column}
    return {}


def _sentence(config: DataConfig, name: str, split: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    setting = "train_split" if split == config.train_split else "val_split"
    hint = next((hint for words, hint in HINTS.items() if words in reason), "")
    hint = hint.replace("{split}", setting)
    where = f"data.dataset={name or 'folder'}, split {split!r}, cannot be read from data.data_path={config.data_path}"
    return f"{where}: {reason}{hint}"
