"""Describe a run in the words and tables of a model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ...models.errors import Json
from ..markdown import code
from ..recorded import recorded_mode

_OFF = {"layer_decay": 1}
"""The value with which a setting does nothing, where it is not 0."""
_WORDS = {"opt": "timm's", "aa": "policy", "clip_grad": "gradients clipped to", "reprob": "erasing"}
MATCHES = {
    "output": "the output of the attention",
    "map": "the attention map, exactly",
    "probes": "the attention map, as random probes see it",
    "rows": "cross-entropy of sampled rows of the attention map",
}
Rows = list[tuple[str, str]]
DescribeTransfer = Callable[[Json], Rows]
"""From the section `transfer` of a recipe to rows; the methods are above this package, so it is handed in."""


def section(config: Json, name: str) -> Json:
    """Return a section of a config, empty if it is absent or not a section."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def lesson_rows(recipe: Json, describe: DescribeTransfer) -> Rows:
    """Return what was taken from the teacher; empty for a run without a teacher."""
    mode = recorded_mode(recipe)
    if mode.matches:
        match = section(recipe, "align").get("match")
        return [("matched", MATCHES.get(str(match), code(match)))] if match else []
    settings = section(recipe, "transfer")
    return describe(settings) if mode.transfers and settings.get("method") else []


def plain_transfer(settings: Json) -> Rows:
    """Return the method's name alone: its words are its own (`graftvit.transfer.methods.method_text`)."""
    return [("method", code(settings.get("method")))]


def recipe_rows(recipe: Json) -> Rows:
    """Return the settings of a run that people ask for first; those that are not recorded are left out."""
    data, optim, student = (section(recipe, name) for name in ("data", "optim", "student"))
    mode = str(recipe.get("mode", ""))
    rows = [
        ("what was done", recorded_mode(recipe).words or (code(mode) if mode else None)),
        ("trained on", _data(data)),
        ("length", _length(optim)),
        ("optimizer", _named(optim, "opt", "betas", "weight_decay", "layer_decay", "clip_grad")),
        ("learning rate", _rate(optim)),
        ("batch", _batch(data, optim)),
        ("augmentation", _named(data, "aa", "mixup", "cutmix", "smoothing", "reprob", "crop_scale", "hflip")),
        ("drop path", number(student["drop_path"]) if student.get("drop_path") else None),
        ("moving average", f"decay {number(optim['ema'])}" if optim.get("ema") else None),
        ("seed", number(recipe["seed"]) if "seed" in recipe else None),
    ]
    return [(name, value) for name, value in rows if value]


def table(rows: Iterable[tuple[str, ...]], *head: str) -> str:
    """Return a Markdown table."""
    lines = [head or ("", ""), tuple("---" for _ in head or ("", "")), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: object) -> str:
    """Return a number as people write it; anything else as code."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}" if known else code(value)


def _data(data: Json) -> str | None:
    name = data.get("dataset") or data.get("data_path")
    if not name:
        return None
    few = f", {number(data['train_samples'])} training samples" if data.get("train_samples") else ""
    return code(name) + few


def _length(optim: Json) -> str | None:
    if optim.get("max_steps"):
        return f"{number(optim['max_steps'])} steps"
    return f"{number(optim['epochs'])} epochs" if "epochs" in optim else None


def _rate(optim: Json) -> str | None:
    rate = number(optim["lr"]) if optim.get("lr") is not None else None
    if rate is None and "blr" in optim:
        rate = f"{number(optim['blr'])} x effective batch / 256"
    warm = optim.get("warmup_epochs")
    return f"{rate}, warm-up of {number(warm)} epochs, then a cosine" if rate and warm is not None else rate


def _batch(data: Json, optim: Json) -> str | None:
    if "batch_size" not in data:
        return None
    steps = optim.get("accum_iter", 1)
    return f"{number(data['batch_size'])} images a device" + (
        f", {number(steps)} accumulated" if steps != 1 else ""
    )


def _named(settings: Json, *names: str) -> str | None:
    """Return settings as words; those that are off are left out."""
    found = {
        name: settings[name] for name in names if settings.get(name) not in (None, "", _OFF.get(name, 0))
    }
    words = [f"{_WORDS.get(name) or name.replace('_', ' ')} {_plain(value)}" for name, value in found.items()]
    return ", ".join(words) or None


def _plain(value: object) -> str:
    return f"({', '.join(map(number, value))})" if isinstance(value, (list, tuple)) else number(value)
