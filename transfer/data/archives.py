"""Archives of image folders, a .tar or a .zip: what they hold, and unpacking the images of it."""

from __future__ import annotations

import posixpath
import shutil
import struct
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from timm.data.dataset_factory import create_dataset
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

from ...checkpoints.files import is_file, open_regular
from ...models.errors import DataError, JsonDict
from ..config import DataConfig
from .augment import reason_of
from .digits import EVAL_NAMES, TRAIN_NAMES
from .loading import SourceLostError
from .streams import stream_columns

SPLITS = (*TRAIN_NAMES, *EVAL_NAMES, "test")
ENDINGS = (".tar", ".zip")
FAILURES = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, OverflowError, struct.error, tarfile.TarError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What a damaged, cut or locked archive fails with."""
BLOCK = 4096
"""Bytes that a small file takes at least on a disk."""


DEEPEST = 100
"""Folders that an image may lie in; making thousands of them is more than Python's stack allows."""


@dataclass(frozen=True)
class Member:
    """An image in an archive."""

    name: str
    size: int
    """Bytes of it, holes among them."""
    open: Callable[[], IO[bytes]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Of its path. Raises DataError where that leads out of the archive, or too deep."""
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{self.name} lies outside of the archive that holds it")
        if len(path.parents) > DEEPEST:
            depth = len(path.parents) - 1
            raise DataError(f"{path.name} lies in {depth} folders, and at most {DEEPEST} are taken")
        return path.parts


def is_packed(config: DataConfig) -> bool:
    """Return whether staging unpacks the data set, and it can be read only then."""
    return config.stage is not None and must_be_unpacked(config)


def must_be_unpacked(config: DataConfig) -> bool:
    """Return whether the data set is a .zip, or a .tar with folders for splits; any other .tar is read as it is.

    Raises DataError: the archive cannot be read.
    """
    path = Path(config.data_path or "")
    if config.dataset not in ("", "folder") or not path.is_file():
        return False
    return path.suffix == ".zip" or (path.suffix == ".tar" and _first_split(path, config) is not None)


def unpack(
    archive: Path, folder: Path, config: DataConfig, moved: Callable[[int], None], *, room: int
) -> None:
    """Write the images of an archive below `folder`, without the folders that all splits lie in.

    `moved` is told of the bytes of each file, and `room` is what `count_images` counted.

    Raises DataError: the archive is damaged, holds no image, or more than was counted.
    """
    above = _first_split(archive, config) or 0
    count = 0
    with _explained(archive), members(archive) as found:
        for member in found:
            room -= on_disk(member.size)
            if room < 0:
                raise DataError(
                    "it holds more than when it was counted; start again when it is no longer written to"
                )
            target = folder.joinpath(*member.parts[above:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                moved(file.tell())
            count += 1
    if not count:
        raise DataError(
            f"Found 0 images in {archive}; the names of images end in {', '.join(IMG_EXTENSIONS)}"
        )


def count_images(archive: Path) -> tuple[int, int]:
    """Return how many images `unpack` would write, and the bytes that they take on a disk."""
    with _explained(archive), members(archive) as found:
        sizes = [on_disk(member.size) for member in found]
    return len(sizes), sum(sizes)


def on_disk(size: int) -> int:
    """Return the bytes of whole blocks that a file takes on a disk."""
    return -(-size // BLOCK) * BLOCK


def _first_split(archive: Path, config: DataConfig) -> int | None:
    """Return how many folders the first image's split lies in; None where there are no folders for splits."""
    names = {*SPLITS, config.train_split, config.val_split}
    with _explained(archive), members(archive) as found:
        first = next(found, None)
        folders = () if first is None else first.parts[:-1]
    return next((place for place, name in enumerate(folders) if name in names), None)


@contextmanager
def members(archive: Path) -> Iterator[Iterator[Member]]:
    """Yield the images of an archive, in its own order; what a Mac puts beside images is left out.

    So are symbolic links. A hard link is a copy of the file that it leads to.
    """
    with open_regular(archive, refusal=DataError) as file:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(file) as zipped:
                yield (
                    Member(info.filename, info.file_size, partial(zipped.open, info))
                    for info in zipped.infolist()
                    if not info.is_dir() and _is_image(info.filename)
                )
            return
        with tarfile.open(fileobj=file, mode="r:") as tarred:
            yield _members_of_tar(tarred)


def _members_of_tar(archive: tarfile.TarFile) -> Iterator[Member]:
    files: dict[str, tarfile.TarInfo | None] = {}
    for info in archive:
        if info.size < 0:  # the next member would be an earlier one, for ever
            raise DataError(f"{info.name} has a size below 0")
        target = posixpath.normpath(info.linkname)
        if info.islnk() and target not in files and _is_image(info.name):
            raise DataError(f"{info.name} is a link to {info.linkname}, which is not before it")
        file = files.get(target) if info.islnk() else info if info.isreg() else None
        files[posixpath.normpath(info.name)] = file
        if file is not None and _is_image(info.name):
            yield Member(info.name, file.size, partial(_content, archive, file))


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    if file is None:
        raise DataError(f"{info.name} is no file")
    return file


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    mac = path.name.startswith("._") or "__MACOSX" in path.parts
    return path.suffix.lower() in IMG_EXTENSIONS and not mac


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"data.data_path={archive} cannot be unpacked: {error}") from error
    except FAILURES as error:
        raise DataError(f"data.data_path={archive} cannot be unpacked: {reason_of(error)}") from error


# What timm reads: tar files, torchvision's data sets and streams, with errors of one sentence.

HINTS = {
    "Dataset length is unknown": "Dataset length is unknown; give --download, or read it with hfds/",
    "You can use download=True to download it": "--download fetches it",
}
"""What users are told in place of words of timm's and torchvision's errors."""


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
        keys = _keys(config, name, split)
        found = create_dataset(
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
        labels = getattr(found, "targets", None)
        if labels is not None and len(labels) != len(found):
            raise SourceLostError(
                _sentence(config, name, split, f"its files have {len(found)} images and {len(labels)} labels")
            )
        return found
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"data.dataset={name} needs a package that is missing: {error}") from error
    except Exception as error:  # each reader fails in its own way: asserts, errors of the network
        damaged = None if isinstance(error, OSError) else _find_damaged(error)
        if damaged is not None:
            reason = f"{damaged} is missing or damaged: remove it, then copy it again or give --download"
            raise SourceLostError(_sentence(config, name, split, reason)) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(_sentence(config, name, split, reason)) from error


def _find_damaged(error: Exception) -> Path | None:
    """Return the file that stopped a data set of torchvision, whose errors do not name it: damaged, or missing beside
    others."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed([each for each in frames if each.f_globals["__name__"].startswith("torchvision.")]):
        for value in frame.f_locals.values():
            if isinstance(value, str) and is_file(Path(value)):
                return Path(value)
        files = _files_of(frame.f_locals.get("self"))
        wrong = [path for path, md5 in files if not check_integrity(path, md5)]
        if wrong and any(path.exists() for path, _ in files):
            return wrong[0]
    return None


def _files_of(dataset: object) -> list[tuple[Path, str | None]]:
    """Return the files of a data set of torchvision, each with its checksum if that is known."""
    if isinstance(dataset, CIFAR10):
        listed = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        return [(Path(dataset.root, dataset.base_folder, name), md5) for name, md5 in listed]
    if isinstance(dataset, MNIST) and isinstance(dataset.resources, list):
        return [(Path(dataset.raw_folder, Path(url).stem), None) for url, _ in dataset.resources]
    return []


def _keys(config: DataConfig, name: str, split: str) -> JsonDict:
    """timm's words for where a sample has its image and its label."""
    family = name.partition("/")[0].lower() if "/" in name else ""
    if family == "hfids":
        columns = stream_columns(config, split)
        return {"input_key": columns.image, "target_key": columns.label}
    if family == "tfds":
        return {"input_key": config.image_column, "target_key": config.label_column}
    return {}


def _sentence(config: DataConfig, name: str, split: str, reason: str) -> str:
    for words, ours in HINTS.items():
        reason = reason.replace(words, ours)
    where = f"data.dataset={name or 'folder'}, split {split!r}, cannot be read from data.data_path={config.data_path}"
    return f"{where}: {reason}"
