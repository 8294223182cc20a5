"""The fuzzer of files: damaged files of every format that is read, each in a process with bounded memory and work.

Each case ends in success with the right numbers or in one sentence. By hand, from the root of the project:

    PYTHONPATH=tests python -m fuzz.files --count 5000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from graftvit.models.errors import GraftError
from support.runs.limits import EndlessError, limited_memory, limited_work

from .formats import FORMATS, WrongError, copy_of

MEMORY = 2 << 30
"""Bytes of address space that a case may take beyond what the process holds once it is ready."""
WORK = 20.0
"""Seconds of processor time of a case: a busy machine does not count."""
IDLE = 60
"""Looks, a second apart, at a process that neither works nor waits for the disk, until it counts as hung."""
LONGEST = 2000
"""Characters of a sentence."""


def check_case(seed: int, number: int, good: Path, scratch: Path) -> dict[str, str | int]:
    """Damages one file and reads it; what came of it."""
    rng = Random(f"{seed} {number}")
    name = list(FORMATS)[number % len(FORMATS)]
    folder = copy_of(good / name, scratch)
    how = FORMATS[name].damage(rng, folder)
    outcome, words = "read", ""
    try:
        with limited_work(WORK):
            FORMATS[name].check(folder)
    except GraftError as error:
        outcome, words = "refused", str(error)
        if not words or "\n" in words or len(words) > LONGEST:
            outcome = "NOT ONE SENTENCE"
    except (Exception, EndlessError) as error:
        outcome, words = "FAILED", f"{type(error).__name__}: {error}"
        if isinstance(error, WrongError):
            outcome = "WRONG NUMBERS"
    return {"case": number, "format": name, "damage": how, "outcome": outcome, "words": words[:400]}


def serve(seed: int, first: int, count: int) -> None:
    """Works off cases in this process and prints a line of JSON for each, and one before each."""
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as place:
        good = Path(place, "good")
        for name, each in FORMATS.items():
            (good / name).mkdir(parents=True)
            each.make(good / name)
            each.check(good / name)  # all is imported, and a file without damage is read
        with limited_memory(MEMORY):
            for number in range(first, first + count):
                sys.stdout.write(f"{number}\n")
                sys.stdout.flush()
                result = check_case(seed, number, good, Path(place, "case"))
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()


def run(count: int, seed: int, first: int = 0) -> Iterator[dict[str, str | int]]:
    """The results of `count` cases; a process that died or hung at one is a result, and another one goes on."""
    last = first + count
    tests = Path(__file__).parents[1]
    paths = (str(tests), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    while first < last:
        command = [sys.executable, "-m", "fuzz.files", "--serve", "--first", str(first)]
        command += ["--count", str(last - first), "--seed", str(seed)]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment)
            hung = _wait(process)
            out.seek(0), errors.seek(0)
            lines = out.read().splitlines()
            yield from (json.loads(line) for line in lines if line.startswith("{"))
            if process.returncode == 0:
                return
            begun = [int(line) for line in lines if line.isdecimal()]
            if not begun:
                raise RuntimeError(f"the process of the fuzzer does not start: {errors.read()[-2000:]}")
            words = errors.read()[-300:]
            how = "it waits for ever" if hung else f"the process ended with {process.returncode}: {words}"
            name = list(FORMATS)[begun[-1] % len(FORMATS)]
            yield {"case": begun[-1], "format": name, "damage": "", "outcome": "FAILED", "words": how}
            first = begun[-1] + 1


def _wait(process: subprocess.Popen[str]) -> bool:
    """Waits for the end of a process; ends one that hangs, and says so."""
    idle, before = 0, ""
    while process.poll() is None:
        time.sleep(1)
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        state, work = fields[0], f"{fields[11]} {fields[12]}"
        idle = idle + 1 if state in "SZ" and work == before else 0
        before = work
        if idle > IDLE:
            process.kill()
            process.wait()
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="in this process, without a watch over it")
    asked = parser.parse_args()
    if asked.serve:
        return serve(asked.seed, asked.first, asked.count)
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in FORMATS}
    for result in run(asked.count, asked.seed, asked.first):
        outcomes[str(result["format"])][str(result["outcome"])] += 1
        if result["outcome"] not in ("read", "refused"):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    for name, counts in outcomes.items():
        sys.stdout.write(f"{name:<30}{dict(sorted(counts.items()))}\n")
    return None


if __name__ == "__main__":
    main()
