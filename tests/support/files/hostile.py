"""Files that mean harm, or are broken in a way that only looks harmless: each by name, with what makes it."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 3
}  # fmt: skip
HUGE = 1 << 40
Make = Callable[[Path, Path], Path]
"""Writes the file into a folder and returns its path; the second path is what a bomb would write."""
CORPUS: dict[str, Make] = {}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model(ARCHITECTURE, **ARGUMENTS).state_dict())


def several(
    *names: str, file: str = "model.pth"
) -> Callable[[Callable[[str, Path, Path], Path | bytes]], None]:
    """One file for each name, made by the same function, which returns the bytes of `file` or the path it wrote."""

    def register(make: Callable[[str, Path, Path], Path | bytes]) -> None:
        for name in names:
            CORPUS[f"{make.__name__}_{name}".rstrip("_")] = partial(_write, make, name, file)

    return register


def _write(
    make: Callable[[str, Path, Path], Path | bytes], name: str, file: str, folder: Path, canary: Path
) -> Path:
    made = make(name, folder, canary)
    if isinstance(made, bytes):
        (folder / file).write_bytes(made)
        return folder / file
    return made


def saved(tree: Any, **how: Any) -> bytes:
    """The bytes of a file of torch."""
    stream = io.BytesIO()
    torch.save(tree, stream, **how)
    return stream.getvalue()


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return stream.getvalue()


def torch_zip(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    numbers = {f"archive/data/{name}": content for name, content in (records or {}).items()}
    return zipped({"archive/data.pkl": pickled, "archive/version": b"3\n", **numbers})


# Pickles that run code.


class Bomb:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def bomb(kind: str, canary: Path) -> Any:
    command = f"touch {canary}"
    return {
        "system": Bomb(os.system, command),
        "eval": Bomb(eval, f"__import__('os').system({command!r})"),
        "write": Bomb(Path.write_text, canary, "boom"),
        "getattr": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "load": Bomb(torch.load, str(canary)),
        "namespace": argparse.Namespace(hook=Bomb(os.system, command)),
    }[kind]


BOMBS = ("system", "eval", "write", "getattr", "load", "namespace")


@several(*BOMBS)
def code_in_zip(kind: str, folder: Path, canary: Path) -> bytes:
    return saved({"model": weights(), "args": bomb(kind, canary)})


@several(*BOMBS)
def code_in_legacy(kind: str, folder: Path, canary: Path) -> bytes:
    return saved({"model": weights(), "args": bomb(kind, canary)}, _use_new_zipfile_serialization=False)


@several("system", "eval")
def code_in_raw_pickle(kind: str, folder: Path, canary: Path) -> bytes:
    return pickle.dumps(bomb(kind, canary))


@several("protocol0", "inst", "object")
def code_by_old_opcodes(kind: str, folder: Path, canary: Path) -> bytes:
    command = f"touch {canary}".encode()
    return torch_zip({
        "protocol0": b"\x80\x02cos\nsystem\n(S'" + command + b"'\ntR.",
        "inst": b"\x80\x02(S'" + command + b"'\nios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\nS'" + command + b"'\no.",
    }[kind])  # fmt: skip


@several("")
def code_as_torchscript(kind: str, folder: Path, canary: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), folder / "model.pt")
    return folder / "model.pt"


@several("")
def code_in_numpy_objects(kind: str, folder: Path, canary: Path) -> Path:
    np.savez(folder / "model.npz", a=np.array([bomb("system", canary)], dtype=object))
    return folder / "model.npz"


# Pickles and archives that lie about sizes.


class Storage:
    """A storage as torch describes it; `view` is the last entry of an old file's."""

    def __init__(self, elements: Any, key: str = "0", *view: Any) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", elements, *view)


class Described:
    """A tensor as torch describes it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (*self.arguments, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Storage) else None


def pickled(tree: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(tree)
    return stream.getvalue()


def legacy(tree: Any, keys: list[str], numbers: bytes) -> bytes:
    """A file as torch wrote it before 1.6."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tree, keys)
    return b"".join(map(pickled, parts)) + numbers


@several(
    "huge_shape", "huge_storage", "negative_shape", "huge_stride", "negative_offset", "no_record", "repeated"
)
def lying_tensor(kind: str, folder: Path, canary: Path) -> bytes:
    tensor = {
        "huge_shape": Described(Storage(4), 0, (HUGE,), (1,)),
        "huge_storage": Described(Storage(HUGE), 0, (4,), (1,)),
        "negative_shape": Described(Storage(4), 0, (-4,), (1,)),
        "huge_stride": Described(Storage(4), 0, (2,), (HUGE,)),
        "negative_offset": Described(Storage(4), -1, (4,), (1,)),
        "no_record": Described(Storage(4, "7"), 0, (4,), (1,)),
        "repeated": Described(Storage(4), 0, (1 << 20, 1 << 20), (0, 0)),
    }[kind]
    return torch_zip(pickled({"pos_embed": tensor}), {"0": bytes(16)})


@several("memo", "nested", "laughs", "key", "shared_key", "self", "long_text")
def pickle_of_endless(kind: str, folder: Path, canary: Path) -> bytes:
    laughs = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (level, level, level + 1) for level in range(60))
    shared = b"".join(b"h%c\x86q%c" % (level, level + 1) for level in range(60))
    return torch_zip({
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo index of two thousand million
        "nested": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "laughs": b"\x80\x02}U\x01a" + laughs + b"s.",
        "key": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",  # a tuple of two of the same, sixty times
        "shared_key": b"\x80\x02})q\x00" + shared + b"K\x01s.",  # the same by the memo
        "self": b"\x80\x02}q\x00U\x01ah\x00s.",
        "long_text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    }[kind])  # fmt: skip


@several("tensor", "typed_tensor", "bytes", "with_attributes", "by_state", "numpy", "codec")
def memory_that_a_pickle_takes(kind: str, folder: Path, canary: Path) -> bytes:
    """All of these names pass torch's own check of names."""
    size = b"(\x8a\x06" + HUGE.to_bytes(6, "little") + b"t"
    storage = b"((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
    stream = {
        "tensor": b"ctorch\nTensor\n" + size + b"R",
        "typed_tensor": b"ctorch\nFloatTensor\n" + size + b"R",
        "codec": b"c_codecs\nencode\n(X\x02\x00\x00\x00\xc3\xa9X\x08\x00\x00\x00punycodetR",
        "numpy": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x07\x00\x00\x00V999999tRtR",
        "bytes": b"c__builtin__\nbytearray\n" + size + b"R",
        "with_attributes":
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nctorch\nTensor\n" + size + b"}tR",
        "by_state":
            b"ctorch._utils\n_rebuild_tensor\n" + storage + b"K\x00(K\x04t(K\x01ttR" + storage + b"K\x00" + size
            + b"(K\x01ttb",
    }[kind]  # fmt: skip
    return torch_zip(b"\x80\x02}U\x01a" + stream + b"s.", {"0": bytes(16)})


@several("huge_storage", "huge_shape", "storage_that_is_not_there")
def lying_legacy(kind: str, folder: Path, canary: Path) -> bytes:
    elements = HUGE if kind == "huge_storage" else 4
    tensor = Described(Storage(elements, "0", None), 0, (HUGE,) if kind == "huge_shape" else (4,), (1,))
    keys = [] if kind == "storage_that_is_not_there" else ["0"]
    return legacy({"pos_embed": tensor}, keys, struct.pack("<q", elements) + bytes(16))


@several("")
def legacy_storage_of_terabytes(kind: str, folder: Path, canary: Path) -> bytes:
    content = saved({"a": torch.zeros(4)}, _use_new_zipfile_serialization=False)
    return content[:-24] + struct.pack("<q", HUGE) + content[-16:]


def _with_member(name: str, content: bytes) -> bytes:
    """A file of torch with one member more, of any name."""
    stream = io.BytesIO(saved({"a": torch.zeros(4)}))
    with zipfile.ZipFile(stream, "a") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = name
        archive.writestr(info, content)
    return stream.getvalue()


@several("parent", "absolute", "backslash")
def archive_that_escapes(kind: str, folder: Path, canary: Path) -> bytes:
    names = {"parent": f"../{canary.name}", "absolute": str(canary), "backslash": f"..\\{canary.name}"}
    return _with_member(names[kind], b"boom")


@several("")
def archive_bomb(kind: str, folder: Path, canary: Path) -> Path:
    with zipfile.ZipFile(folder / "model.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 26,)}
        )
        with archive.open(
            "a.npy", "w"
        ) as member:  # piece by piece: the test may not hold what the file describes
            member.write(stream.getvalue())
            for _ in range(1 << 8):
                member.write(bytes(1 << 20))
    return folder / "model.npz"


@several("")
def archive_with_one_name_twice(kind: str, folder: Path, canary: Path) -> bytes:
    return _with_member("archive/data.pkl", pickle.dumps(bomb("system", canary)))


@several("", file="model.npz")
def archive_that_overlaps(kind: str, folder: Path, canary: Path) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(4, np.float32), b=np.ones(4, np.float32))
    content = bytearray(stream.getvalue())
    first = content.find(b"PK\x01\x02")
    second = content.find(b"PK\x01\x02", first + 4)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # both begin at the same place
    return bytes(content)


@several("shape", "cut", "version", file="model.npz")
def lying_array(kind: str, folder: Path, canary: Path) -> bytes:
    stream = io.BytesIO()
    shape = (HUGE,) if kind == "shape" else (4,)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content = stream.getvalue() + bytes(8 if kind == "cut" else 16)
    return zipped({"a.npy": content[:6] + b"\x09\x00" + content[8:] if kind == "version" else content})
