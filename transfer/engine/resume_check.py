"""Whether a run folder may be continued, and where."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.class_names import KEY as LABEL_NAMES
from ...checkpoints.class_names import difference
from ...checkpoints.files import read_if_there
from ...checkpoints.sources import CONFIG
from ...models.errors import CheckpointError, ConfigError, DataError, Json, JsonDict, counted
from ...models.plain_yaml import YamlError, parse_yaml
from ..config import RunConfig
from ..setting import as_inherited, is_free

SETTINGS = "config.yaml"
"""The settings of a run in its folder."""

logger = logging.getLogger(__name__)
BUILT = (
    "architecture", "model_args", "config", "preprocessing",
    "input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation",
)  # fmt: skip
"""Facts of a teacher and a student in a state, which must stay as they are."""


@dataclass
class Position:
    """How far a run is. `epoch_step` counts the optimizer steps of the current epoch, `step` all of them."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    best: float | None = None
    stale: int = 0
    """Evaluations since the last best value."""
    best_metric: str = "top1"
    """Metric that `best` is a value of."""
    metrics: dict[str, float] = field(default_factory=dict)
    records: int = 0
    """Records of log.jsonl that belong to the run up to here."""
    run_id: str = ""
    """Name of the run for a tracker."""

    def meta(self) -> JsonDict:
        """Return the position as JSON."""
        return asdict(self)


def settings(config: RunConfig) -> JsonDict:
    """Return the configuration as JSON."""
    return config.model_dump(mode="json")


BEGUN = ("optim.warmup_epochs", "pretrain.decoder_dim", "pretrain.decoder_depth", "pretrain.decoder_heads")
"""Settings that follow from others unless they are given; an older run wrote numbers that did not."""


def as_begun(config: RunConfig, saved: Json) -> RunConfig:
    """Return the settings of a resumed run with the values of `BEGUN` that its state has and the user did not give."""
    for section, name in (key.split(".") for key in BEGUN):
        before = saved["config"].get(section, {}).get(name)
        own = getattr(config, section)
        if before is not None and getattr(own, name) is None:
            config = config.model_copy(update={section: own.model_copy(update={name: before})})
            config = as_inherited(config, [f"{section}.{name}"])
    return config


def check_same_run(saved: Json, config: RunConfig) -> None:
    """Refuse to continue a run with another model, method, optimizer, data or seed.

    `optim.accum_iter` is left to `elastic.check_spread`: it goes with the number of processes.
    Raises ConfigError naming the first setting that differs. `saved` is the meta part of a state.
    """
    for key, (before, now) in changes(saved, config).items():
        if is_free(RunConfig, key):
            continue
        if config.output_dir == RunConfig.model_fields["output_dir"].default:
            raise ConfigError(
                f"{config.output_dir}, the default of output_dir, holds another run, which was started with "
                f"{key}={before!r}, not {now!r}: give --output_dir DIR for a new run, or that value to resume the other"
            )
        raise ConfigError(
            f"{key}={now!r}, but the run in {config.output_dir} was started with "
            f"{before!r}: give the value that it was started with, or another output_dir"
        )


def changes(saved: Json, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from those which the state with the meta part `saved` was made with."""
    found = differences(saved["config"], settings(as_begun(config, saved)))
    for name in _teachers(saved["origins"]):
        revision, commit = f"{name}.revision", commits_of(saved).get(name.removeprefix("teachers."))
        if revision in found and _same_commit(*found[revision], commit):
            del found[revision]
    return found


def differences(before: Json, now: Json) -> dict[str, tuple[Any, Any]]:
    """Key -> value then and now, of what is not the same, as in {"optim.epochs": (3, 10)}."""
    flat, other = dict(_flat(before)), dict(_flat(now))
    keys = sorted(flat.keys() | other.keys())
    return {key: (flat.get(key), other.get(key)) for key in keys if flat.get(key) != other.get(key)}


def describe_changes(found: Mapping[str, tuple[Any, Any]]) -> str:
    """`changed: optim.epochs 3 -> 10, nodes 1 -> 2`; nothing where all is the same."""
    words = [
        f"{key} {_plain(before)} -> {_plain(now)}"
        for key, (before, now) in found.items()
        if key != "output_dir" and _plain(before) != _plain(now) and not _replaced(key, found)
    ]
    return f"changed: {', '.join(words)}" if words else ""


def _replaced(key: str, found: Mapping[str, tuple[Any, Any]]) -> bool:
    """Return whether a length in epochs gave way to one in steps, which is among the changes."""
    prefix, epochs, _ = key.rpartition("optim.epochs")
    return bool(epochs) and found.get(f"{prefix}optim.max_steps", (None, None))[1] is not None


def _plain(value: Any) -> str:
    return "none" if value in (None, {}, [], ()) else str(value)


def check_same_classes(saved: Json, names: Sequence[str] | None, folder: Path) -> None:
    """ConfigError where the outputs of the student would stand for other classes than before.

    Data sets whose classes have no names say nothing of it.
    """
    before = saved["student"].get(LABEL_NAMES)
    if before is None or names is None or list(before) == list(names):
        return
    raise ConfigError(
        f"the run in {folder} was started with other classes than data.data_path has now: it was started with "
        f"{len(before)} classes, and now there are {len(names)}; the first that differ are "
        f"{difference(before, names)}: name the class folders as they were, or give another output_dir"
    )


def check_same_weights(saved: Json, origins: Json, student: Json, folder: Path) -> None:
    """Refuse to continue a run with another teacher behind the same path, or with images that are made in another way.

    Args:
        saved: The meta part of a state.
        origins: What is known of the weights that were loaded now (`Parts.origins`).
        student: What is known of the student that was built now (`StudentPlan.meta`).
        folder: The run folder, for the sentence.

    Raises ConfigError naming what differs.
    """
    pairs: dict[str, tuple[Json, Json]] = {}
    known_then = _teachers(saved["origins"])
    for name, teacher in _teachers(origins).items():
        before = known_then.get(name, {})
        if _differ(before.get("digest"), teacher.get("digest")):
            raise ConfigError(
                f"{name}.source={teacher.get('source')!r} holds other weights than those that the run in {folder} was "
                f"started with (sha256 {before['digest'][:12]} then, {teacher['digest'][:12]} now): put those back, or "
                "give another output_dir"
            )
        library = before.get("library")
        if _differ(library, teacher.get("library")):
            logger.warning(
                "%s of the run in %s is now computed by %s, and was by %s",
                name,
                folder,
                teacher["library"],
                library,
            )
        if teacher.get("digest") is not None:  # else it is known by its name alone, for a plan
            pairs[name] = before, teacher
    pairs["student"] = saved["student"], student
    for name, (then, now) in pairs.items():
        now = json.loads(json.dumps({key: now[key] for key in BUILT if key in now and key in then}))
        known, found = dict(_flat({key: then[key] for key in now})), dict(_flat(now))
        shared = known.keys() & found.keys()
        for key in sorted(known.keys() | found.keys()):
            if key.startswith("config.") and key not in shared:
                continue  # of another version of transformers, or unknown to it
            if known.get(key) != found.get(key):
                raise ConfigError(
                    f"{name}.{key}={found.get(key)!r}, but the run in {folder} was started with {known.get(key)!r}: "
                    "put the weights and their config.json back as they were, or give another output_dir"
                )


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now


def _same_commit(before: str | None, now: str | None, commit: str | None) -> bool:
    """Return whether one is the run's own config.yaml, which has the commit, and the other what it was started with."""
    return now == commit or (before == commit and now is None)


def _teachers(origins: Json) -> dict[str, Json]:
    """Return what is known of the teachers, by their sections."""
    further = {f"teachers.{name}": each for name, each in (origins.get("teachers") or {}).items()}
    return {"teacher": origins.get("teacher") or {}, **further}


def commits_of(saved: Json) -> dict[str, str | None]:
    """Return the commits on the hub that the teachers were loaded at when the run began, by name."""
    found = _teachers(saved["origins"])
    return {name.removeprefix("teachers."): each.get("revision") for name, each in found.items()}


def _flat(tree: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
            yield f"{prefix}{key}", counted(len(value), "loss")
            for index, each in enumerate(value):
                yield from _flat(each, f"{prefix}{key}[{index}].")
        else:
            yield f"{prefix}{key}", value


def check_length(position: Position, total_steps: int) -> None:
    """Refuse a run that is now shorter than what it has done."""
    if position.step > total_steps:
        raise ConfigError(
            f"optim.epochs or optim.max_steps asks for {total_steps} steps, "
            f"but the run has done {position.step} already"
        )


def refuse_existing(folder: Path, resume: str) -> None:
    """ConfigError where `folder` holds a saved model, settings of something else, or a run that `engine.resume=never`
    must not write over."""
    if (folder / CONFIG).is_file():
        raise ConfigError(
            f"output_dir={folder} holds a saved model ({CONFIG}), and a run needs a folder of its own: give another "
            "output_dir, or move the model away"
        )
    if _is_foreign(folder / SETTINGS):
        raise ConfigError(
            f"output_dir={folder} has a {SETTINGS} that no run wrote, and a run writes its own: give another output_dir"
        )
    for name in (SETTINGS, "log.jsonl", "checkpoints", "student") if resume == "never" else ():
        if (folder / name).exists():
            raise ConfigError(
                f"output_dir={folder} already holds a run ({name}), and engine.resume=never does not write "
                "over it: give another output_dir, or engine.resume=auto to continue it"
            )


def _is_foreign(path: Path) -> bool:
    """Return whether a file holds keys by name, and is not the settings of a run."""
    try:
        text = read_if_there(path)
        found = None if text is None else parse_yaml(text)
    except (CheckpointError, YamlError):
        return False  # a damaged run of ours resumes from its state
    return isinstance(found, dict) and not {"engine", "student"} & found.keys()


def check_same_code(origins: list[JsonDict]) -> None:
    """CheckpointError where the processes would compute a teacher with different code."""
    codes = [(own.get("teacher") or {}).get("library") for own in origins]
    if len(set(codes)) > 1:
        raise CheckpointError(
            f"the processes compute the teacher with different code ({', '.join(map(str, codes))}): put one "
            "environment on a disk that every machine sees"
        )


def check_same_split(found: list[bool]) -> None:
    """DataError where only some processes could open the test images: the others would wait for them for ever."""
    if len(set(found)) > 1:
        raise DataError(
            "some processes could open the validation split and some could not: put the data set on a disk that "
            "every machine sees"
        )
