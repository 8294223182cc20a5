"""What a run did, in the words and tables of a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..markdown import code

METHODS = {
    "copy": "the teacher's attention maps in place of the student's, on the student's values",
    "copy_q": "the teacher's queries in place of the student's",
    "copy_k": "the teacher's keys in place of the student's",
    "copy_v": "the teacher's values in place of the student's",
    "distill": "{loss} between the student's attention maps and the teacher's",
    "distill_q": "mean squared error between the student's queries and the teacher's",
    "distill_k": "mean squared error between the student's keys and the teacher's",
    "distill_v": "mean squared error between the student's values and the teacher's",
    "attention_output": "mean squared error between what the heads put out, before the output projection",
    "block_output": "mean squared error between what the blocks put out",
    "feature": "{feature_loss} between the pooled features before the head",
    "logits": "KL divergence between the class probabilities",
}
_LOSSES = {
    "ce": "cross-entropy",
    "kl": "KL divergence",
    "cosine": "cosine distance",
    "smooth_l1": "smooth L1",
}
_WITHOUT_LAYERS = ("feature", "logits")
_WITHOUT_HEADS = ("block_output", *_WITHOUT_LAYERS)
_OFF = {"layer_decay": 1}
"""The value with which a setting does nothing, where it is not 0."""
_WORDS = {"opt": "timm's", "aa": "policy", "clip_grad": "gradients clipped to", "reprob": "erasing"}
MATCHES = {
    "output": "what the attention puts out",
    "map": "the attention map, exactly",
    "probes": "the attention map, as random probes see it",
    "rows": "cross-entropy of sampled rows of the attention map",
}
MODES = {
    "transfer": "transfer of attention from a frozen teacher",
    "align": "alignment of each converted layer with a frozen teacher's, on the teacher's own inputs",
    "finetune": "fine-tuning",
    "scratch": "training from scratch, without a teacher",
    "pretrain": "masked autoencoding, without labels; these are the weights of the encoder",
}

Rows = list[tuple[str, str]]


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a config, empty where it is absent or is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def transfer_rows(recipe: Mapping[str, Any]) -> Rows:
    """Method, layers, heads and weight of the transfer, or what was aligned; nothing for a run without either."""
    if recipe.get("mode") == "align":
        match = section(recipe, "align").get("match")
        return [("matched", MATCHES.get(str(match), code(match)))] if match else []
    settings = section(recipe, "transfer")
    method = str(settings.get("method", ""))
    if recipe.get("mode") != "transfer" or not method:
        return []
    losses = {name: _LOSSES.get(str(settings.get(name)), "a distance") for name in ("loss", "feature_loss")}
    rows = [("method", f"{code(method)}: {METHODS.get(method, 'not described here').format(**losses)}")]
    if method not in _WITHOUT_LAYERS and "layers" in settings:
        rows.append(("layers", _layers(settings["layers"])))
    if method not in _WITHOUT_HEADS and "heads" in settings:
        rows.append(("heads", _heads(settings["heads"])))
    if not method.startswith("copy") and "weight" in settings:
        over = {"sum": ", summed over layers", "mean": ", averaged over layers"}
        rest = over.get(str(settings.get("reduction")), "") if method not in _WITHOUT_LAYERS else ""
        rows.append(("weight of its loss", f"{number(settings['weight'])}{rest}"))
    if settings.get("temperature", 1.0) != 1.0:
        rows.append(("temperature", number(settings["temperature"])))
    return rows


def recipe_rows(recipe: Mapping[str, Any]) -> Rows:
    """The settings of a run that people ask for first; those that are not recorded are left out."""
    data, optim, student = (section(recipe, name) for name in ("data", "optim", "student"))
    mode = str(recipe.get("mode", ""))
    rows = [
        ("what was done", MODES.get(mode, code(mode)) if mode else None),
        ("trained on", _data(data)),
        ("length", _length(optim)),
        ("optimiser", _named(optim, "opt", "betas", "weight_decay", "layer_decay", "clip_grad")),
        ("learning rate", _rate(optim)),
        ("batch", _batch(data, optim)),
        ("augmentation", _named(data, "aa", "mixup", "cutmix", "smoothing", "reprob", "crop_scale", "hflip")),
        ("drop path", number(student["drop_path"]) if student.get("drop_path") else None),
        ("moving average", f"decay {number(optim['ema'])}" if optim.get("ema") else None),
        ("seed", number(recipe["seed"]) if "seed" in recipe else None),
    ]
    return [(name, value) for name, value in rows if value]


def table(rows: Iterable[tuple[str, ...]], *head: str) -> str:
    """A Markdown table."""
    lines = [head or ("", ""), tuple("---" for _ in head or ("", "")), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: object) -> str:
    """A number the way people write it; anything else as code."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}" if known else code(value)


def _layers(layers: object) -> str:
    kind, _, count = str(layers).partition(":")
    if layers == "all":
        return "all"
    if kind in ("first", "last") and count.isdigit():
        return f"the {kind} {count}"
    if kind == "every" and count.isdigit():
        return f"one in {count}, and the last"
    return _pairs(layers)


def _heads(heads: object) -> str:
    if heads == "mean":
        return "the means of groups of the teacher's heads"
    if heads == "match":
        return "all, each paired with a teacher's head by the least distance between maps"
    return "all" if heads == "all" else _pairs(heads)


def _pairs(chosen: object) -> str:
    """0,3,5, or teacher > student pairs, counted from 0."""
    items = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    text = ", ".join(
        ">".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item) for item in items
    )
    return code(text) + (" (teacher > student)" if ">" in text else "")


def _data(data: Mapping[str, Any]) -> str | None:
    name = data.get("dataset") or data.get("data_path")
    if not name:
        return None
    few = f", {number(data['train_samples'])} training samples" if data.get("train_samples") else ""
    return code(name) + few


def _length(optim: Mapping[str, Any]) -> str | None:
    if optim.get("max_steps"):
        return f"{number(optim['max_steps'])} steps"
    return f"{number(optim['epochs'])} epochs" if "epochs" in optim else None


def _rate(optim: Mapping[str, Any]) -> str | None:
    rate = number(optim["lr"]) if optim.get("lr") is not None else None
    if rate is None and "blr" in optim:
        rate = f"{number(optim['blr'])} x effective batch / 256"
    warm = optim.get("warmup_epochs")
    return f"{rate}, warm-up of {number(warm)} epochs, then a cosine" if rate and warm is not None else rate


def _batch(data: Mapping[str, Any], optim: Mapping[str, Any]) -> str | None:
    if "batch_size" not in data:
        return None
    steps = optim.get("accum_iter", 1)
    return f"{number(data['batch_size'])} images a device" + (
        f", {number(steps)} accumulated" if steps != 1 else ""
    )


def _named(settings: Mapping[str, Any], *names: str) -> str | None:
    """Settings as words; those that are off are left out."""
    found = {
        name: settings[name] for name in names if settings.get(name) not in (None, "", _OFF.get(name, 0))
    }
    words = [f"{_WORDS.get(name) or name.replace('_', ' ')} {_plain(value)}" for name, value in found.items()]
    return ", ".join(words) or None


def _plain(value: object) -> str:
    return f"({', '.join(map(number, value))})" if isinstance(value, (list, tuple)) else number(value)
