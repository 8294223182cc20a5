"""What holds for all tests."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("graftvit", deadline=None)  # a busy machine is no failure
settings.load_profile("graftvit")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup, which ignores it
gc.disable()  # while the tests are imported, which makes millions of objects and no garbage


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait longest, those of a cluster; those of one file share it, in one process."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("slurm", "slow")])


def pytest_collection_finish() -> None:
    """Search for garbage seldom, and not in what was imported: that takes half of the time of small tests."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """Put it back, because libraries report what is not freed at the end as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def level_of_our_log() -> Iterator[None]:
    """Put back after each test: every command sets it for its process."""
    ours = logging.getLogger("graftvit")
    before = ours.level
    yield
    if ours.level != before:  # setting it makes every logger of the process forget what it logs
        ours.setLevel(before)


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process, as in `typed("jobs", folder, code=2).err`."""
    from support.runs.typed import run_typed

    return partial(run_typed, capsys)


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    """Measure on the first hundred of the 500 test digits, which take a third of the time of a short run."""
    from graftvit.transfer.data import digits

    read = digits._read_split

    def fewer(split: str) -> tuple[Any, ...]:
        return tuple(part[:100] if split == "validation" else part for part in read(split))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_read_split", fewer)
        yield
