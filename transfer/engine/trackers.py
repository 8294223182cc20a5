"""Experiment trackers of accelerate: TensorBoard in the run folder, Weights & Biases if requested."""

from __future__ import annotations

from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_wandb_available

from ...models.errors import ConfigError, JsonDict, one_sentence

HELP = {"wandb": ": `wandb login` once, or WANDB_MODE=offline where there is no network"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    if "wandb" in names and not is_wandb_available():
        raise ConfigError(
            "engine.trackers asks for wandb, which is not installed: pip install 'graftvit[wandb]'"
        )


def create_trackers(names: tuple[str, ...], folder: Path, run_id: str, step: int) -> list[GeneralTracker]:
    """Create the trackers of a run at `step`, and drop what an earlier attempt logged after it.

    Raises ConfigError: a tracker's package is missing, or it does not start.
    """
    check_trackers(names)
    trackers: list[GeneralTracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1))
        else:
            trackers.append(
                WandBTracker("graftvit", name=folder.name, dir=str(folder), id=run_id, resume="allow")
            )
    for tracker in trackers:
        _start(tracker)
    return trackers


def _start(tracker: GeneralTracker) -> None:
    try:
        tracker.start()
    except (
        Exception
    ) as error:  # trackers raise their own errors: no key, no network, a folder that cannot be written
        raise ConfigError(
            f"engine.trackers={tracker.name} does not start ({one_sentence(str(error))}){HELP.get(tracker.name, '')}"
        ) from error


def hyperparameters(settings: JsonDict, **extra: float) -> JsonDict:
    """Return the run's settings as the flat scalars that trackers accept."""
    flat: JsonDict = dict(extra)
    for section, values in settings.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{section}.{key}" if key else section
            flat[name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
