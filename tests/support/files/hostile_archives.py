"""Archives that one reader of zip reads otherwise than another one, and small files that describe a lot.

What they show is in order: without a check of its own, each of them loads.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.files.hostile import (
    ARCHITECTURE,
    ARGUMENTS,
    Described,
    Storage,
    legacy,
    pickled,
    saved,
    several,
    torch_zip,
    weights,
    zipped,
)  # fmt: skip

END, END64, LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


def _records(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved({"model": tensors}))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _directory(archive: bytes) -> tuple[bytes, int, int, int]:
    """Records and directory of an archive; the number of entries, and size and place of the directory."""
    end = archive.rfind(END)
    return archive[:end], *struct.unpack("<HLL", archive[end + 10 : end + 20])


def _two_ends(shown: dict[str, bytes], hidden: dict[str, bytes]) -> bytes:
    """One reader takes the 64-bit end before its locator, another one the end that the locator leads to."""
    content, _, size, place = _directory(zipped(shown | hidden))
    records, directory = content[:place], content[place : place + size]
    cut = directory.find(b"PK\x01\x02", directory.rfind(b"archive/"))  # behind the last shown entry
    parts = directory[:cut], directory[cut:]
    other = parts[1] + _end64(len(hidden), len(parts[1]), place)
    told = parts[0] + _end64(len(shown), len(parts[0]), place + len(other))
    locator = struct.pack("<4sLQL", LOCATOR64, 0, place + len(parts[1]), 1)
    end = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return records + other + told + locator + end


def _end64(entries: int, size: int, place: int) -> bytes:
    return struct.pack("<4sQ2H2L4Q", END64, 44, 45, 45, 0, 0, entries, entries, size, place)


@several("other_case", "shifted", "two_ends_64", "comment")
def archive_of_two_readings(kind: str, folder: Path, canary: Path) -> bytes:
    shown, hidden = _records(weights()), _records({name: tensor + 1 for name, tensor in weights().items()})
    first, second = zipped(shown), zipped(hidden)
    if kind == "other_case":
        upper = {"archive/DATA.PKL": hidden["archive/data.pkl"]}
        first_name, *rest = shown
        return zipped({first_name: shown[first_name], **upper, **{name: shown[name] for name in rest}})
    if kind == "shifted":
        return _directory(second)[0] + first  # the place of the directory is that of the hidden one
    if kind == "two_ends_64":
        return _two_ends(shown, {name.replace("archive/", "other/"): hidden[name] for name in hidden})
    return first[:-2] + struct.pack("<H", 22) + END + bytes(18)


@several("lists_packed", "lists_raw", "packed_tensors")
def more_than_the_file(kind: str, folder: Path, canary: Path) -> bytes:
    lists = b"\x80\x02](" + b"]" * (3 << 20) + b"e."
    if kind == "lists_raw":
        return lists
    packed = (
        {"archive/data.pkl": lists, "archive/version": b"3\n"}
        if kind == "lists_packed"
        else _records(weights())
    )
    return zipped(packed, zipfile.ZIP_DEFLATED)


@several("ints", "names", "paths", "items")
def work_that_grows_with_the_square(kind: str, folder: Path, canary: Path) -> bytes:
    """Keys of one hash, and a long text that is copied again and again."""
    collisions = [b"\x8a\x0b" + (number * (2**61 - 1)).to_bytes(11, "little") for number in range(60_000)]
    megabytes = b"X" + struct.pack("<I", 4 << 20) + b"x" * (4 << 20)
    stream = {
        "ints": b"}(" + b"".join(key + b"N" for key in collisions) + b"u.",
        "items": b"}U\x01ac__builtin__\nset\n((" + b"".join(collisions) + b"ttRs.",
        "names": megabytes + b"q\x000" + b"h\x00h\x00\x930" * 100_000 + b"N.",
        "paths": b"}" + megabytes + b"](" + b"K\x00" * 400_000 + b"es.",
    }[kind]
    return torch_zip(b"\x80\x02" + stream)


@several("zip", "npz")
def directory_of_gigabytes(kind: str, folder: Path, canary: Path) -> Path:
    """A file with a hole: it takes no place on the disk, and its end says that it is nearly all directory."""
    path = folder / f"model.{'pth' if kind == 'zip' else 'npz'}"
    size = 3 << 30
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", END, 0, 0, 1, 1, size - 4, 4, 0))
    return path


def record_of_a_lying_size(path: Path) -> None:
    """Its directory says that a record is longer than its bytes, so a tensor would take those of the next record."""
    tree = {"a": Described(Storage(48), 0, (48,), (1,)), "b": Described(Storage(4, "1"), 0, (4,), (1,))}
    content = bytearray(torch_zip(pickled(tree), {"0": bytes(16), "1": bytes(16)}))
    entry = content.find(b"archive/data/0", content.find(b"PK\x01\x02")) - 46
    content[entry + 24 : entry + 28] = struct.pack("<L", 192)
    path.write_bytes(content)


def legacy_view_of_another_storage(path: Path) -> None:
    """A view under the key of a small storage: torch would take that one, and lengthen it to the tensor's size."""
    small, view = Storage(1, "1", None), Storage(1000, "0", ("1", 0, 1000))
    tree = {"small": Described(small, 0, (1,), (1,)), "view": Described(view, 0, (1000,), (1,))}
    numbers = struct.pack("<q", 1000) + bytes(4000) + struct.pack("<q", 1) + bytes(4)
    path.write_bytes(legacy(tree, ["0", "1"], numbers))


@several("zip", "safetensors")
def name_that_writes_to_the_terminal(kind: str, folder: Path, canary: Path) -> Path:
    tensors = weights() | {"blocks.\x1b[2J\nrefused: nothing": torch.zeros(1)}
    path = folder / ("model.pth" if kind == "zip" else "model.safetensors")
    torch.save(tensors, path) if kind == "zip" else save_file(tensors, path)
    return path


@several("dots", "nothing", "long", "nested", "number", "twice")
def index_that_is_none(kind: str, folder: Path, canary: Path) -> Path:
    inner = _model_folder(folder, {})
    save_file(weights(), inner / "a.safetensors")
    names: dict[str, Any] = dict.fromkeys(weights(), "a.safetensors")
    one = next(iter(names))
    names |= {"dots": {one: ".."}, "nothing": {one: ""}, "long": {one: "a" * 5000}}.get(kind, {})
    text = {
        "nested": '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}",
        "number": '{"weight_map":' + "9" * 5000 + "}",
        "twice": json.dumps({"weight_map": names}).replace(
            '{"weight_map": {', f'{{"weight_map": {{"{one}": "b",'
        ),
    }.get(kind, json.dumps({"weight_map": names}))
    (inner / "model.safetensors.index.json").write_text(text)
    return inner


@several("parent", "absolute", "list", "long", "nested")
def config_that_escapes(kind: str, folder: Path, canary: Path) -> Path:
    secret = folder / "secret.safetensors"
    save_file(weights(), secret)
    named = {"parent": "../secret.safetensors", "absolute": str(secret), "list": ["a"], "long": "a" * 5000}
    inner = _model_folder(folder, {"pretrained_cfg": {"hf_hub_filename": named.get(kind)}})
    if kind == "nested":
        (inner / "config.json").write_text('{"architecture":' + "[" * 100_000 + "]" * 100_000 + "}")
    return inner


def _model_folder(folder: Path, more: dict[str, Any]) -> Path:
    inner = folder / "model"
    inner.mkdir()
    config = {"architecture": ARCHITECTURE, "model_args": ARGUMENTS, **more}
    (inner / "config.json").write_text(json.dumps(config))
    return inner
