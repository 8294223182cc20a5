"""Write the model card of a student: metadata that the hub reads, and how the student was made, in plain words."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import resources

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template
from timm.models import get_pretrained_cfg

from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copying.copying_operators import COPIES
from ..models.errors import CheckpointError, ConfigError, Json, JsonDict
from ..models.layer_plan import BUILT_IN
from ..models.plain_yaml import write_yaml
from ..models.plan_syntax import AS_IT_IS, NONE, operators_in
from .architecture import is_ours
from .copying_students import BARE_WORDS
from .licenses import (
    NAMED,
    card_fields,
    carried,
    check_named,
    check_shareable,
    normalize,
    public,
    recorded_mode,
)
from .markdown import code, fenced, plain
from .provenance import BARE, COST, KEY, PICKED, licenses

# Describe a run in the words and tables of a model card.

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
    """Return the method's name alone: its words are its own."""
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
    if rate is None or "warmup_epochs" not in optim:
        return rate
    known = ((optim.get(f"warmup_{unit}"), unit) for unit in ("epochs", "steps"))
    given = (f"{number(length)} {unit}" for length, unit in known if length is not None)
    warm_up = next(given, "at most a tenth of the run")
    return f"{rate}, warm-up of {warm_up}, then {code(optim.get('schedule', 'cosine'))}"


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


# Find the license of a published student: from its weights, the user and an existing card.


@dataclass(frozen=True)
class Claim:
    """A license and what it rests on."""

    license: str | None
    """Hub identifier, None where it is unknown."""
    sources: tuple[str | None, ...]
    """Of the weights that the student was made from; None for an unknown one."""
    named: bool
    """Whether the user named it."""
    confirmed: bool
    """Whether the user confirmed that it may be laxer than `sources`."""


def claim_license(config: Json, named: str | None, *, confirmed: bool) -> Claim:
    """Return the license of a student with this config.json: the `named` one, else the one that it carries.

    Raises CheckpointError: as `carried`, `check_named` and `check_shareable`.
    """
    sources = _sources(config)
    for source in sources:
        check_shareable(source, confirmed=confirmed)
    if named is None:
        return Claim(carried(*sources), sources, named=False, confirmed=confirmed)
    license = check_named(named, *sources, confirmed=confirmed)
    return Claim(license, sources, named=True, confirmed=confirmed)


def license_of_card(card: str, claim: Claim, place: str) -> str | None:
    """Return the license of a student whose card somebody wrote. `place` says which card it is.

    Raises CheckpointError: its head is no YAML; and unless it is confirmed: it names no license although the
    student carries one, a laxer one, or another one than the user does.
    """
    found = _stated(card, place, {*NAMED, *claim.sources})
    flag = f"the license in {place}"
    if not found:
        if claim.license is None or claim.confirmed:
            return claim.license
        raise CheckpointError(
            f"{place} names no license, and the student is under {claim.license}: add `license: {claim.license}` to "
            "its head, or add --confirm_license"
        )
    names = [check_named(text, *claim.sources, confirmed=claim.confirmed, flag=flag) for text in found]
    if claim.named and claim.license not in names:
        raise CheckpointError(
            f"{flag} is {' and '.join(map(str, names))}, but the student would be pushed under {claim.license}: name "
            "the same in both, with --license and in the head of the card"
        )
    return claim.license if claim.named else names[0]


def _sources(config: Json) -> tuple[str | None, ...]:
    """Return what the config records about the weights that the student was made from.

    The license of the weights themselves answers for an origin that is unknown, for the writer knew it.
    """
    origins = [normalize(license) for license in licenses(section(config, KEY))]
    own = normalize(section(config, "pretrained_cfg").get("license"))
    return tuple(origins) if own is None else (own, *(license for license in origins if license))


def _stated(card: str, place: str, known: Collection[str | None]) -> list[str]:
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"the head of {place} is damaged: {error}") from error
    stated = data.get("license") or []
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated])]
    other = normalize(str(data.get("license_name") or ""))
    return [other if name == "other" and other is not None and other in known else name for name in names]


# What the sections of a model card say, from a student's config.json.


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the student's config.json."""

    repository: str
    license: str | None
    """Hub identifier, None where it is unknown."""
    revision: str | None = None
    """Branch, None for main."""
    parameters: int | None = None
    sharded: bool = False
    """Whether the weights are in several files, which timm does not read."""
    alone: bool = False
    """Whether there is a file by which the model loads without graftvit."""
    dataset_name: str | None = None
    """A pretty name of the data that was evaluated on."""
    describe_transfer: DescribeTransfer = plain_transfer

    @property
    def name(self) -> str:
        """The repository without its owner."""
        return self.repository.rpartition("/")[2]


def load_lines(config: Json, facts: CardFacts, *, alone: bool = False) -> list[str]:
    """Return the three lines of Python that load the model from the hub: with timm if it can, else with graftvit.

    With `alone`, they load it by its own file, through transformers.
    """
    source = json.dumps(f"hf-hub:{facts.repository}" + (f"@{facts.revision}" if facts.revision else ""))
    prepared = "timm.data.resolve_model_data_config(model)"
    transform = f"transform = timm.data.create_transform(**{prepared}, is_training=False)"
    if alone:
        branch = f", revision={json.dumps(facts.revision)}" if facts.revision else ""
        given = f"{json.dumps(facts.repository)}{branch}, trust_remote_code=True"
        load = f"model = transformers.AutoModel.from_pretrained({given}).model"
        return ["import timm, transformers", load, transform]
    if needs_graftvit(config, facts):
        return ["import graftvit, timm", f"model = graftvit.load({source}).eval()", transform]
    return ["import timm", f"model = timm.create_model({source}, pretrained=True).eval()", transform]


def needs_graftvit(config: Json, facts: CardFacts) -> bool:
    """Return whether timm alone cannot load it."""
    return is_ours(str(config.get("architecture"))) or facts.sharded


def classes(config: Json) -> int:
    """Return how many classes the student has, 0 for none."""
    count = config.get("num_classes")
    return count if isinstance(count, int) else 0


def measured(config: Json) -> dict[str, float]:
    """Return the recorded results that are numbers."""
    return {
        key: float(value)
        for key, value in section(section(config, KEY), "results").items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _recipe(config: Json) -> Json:
    return section(section(config, KEY), "recipe")


def _loading_rows(config: Json) -> Rows:
    """Return what a user must know to load the model and to prepare its images."""
    described, size = section(config, "pretrained_cfg"), section(config, "pretrained_cfg").get("input_size")
    rows = [("architecture", code(config.get("architecture")))] if config.get("architecture") else []
    if isinstance(size, list):
        rows.append(("input (channels x height x width)", " x ".join(map(number, size))))
    for name in ("mean", "std"):
        values = described.get(name)
        if isinstance(values, list):
            rows.append((f"{name} of each channel", ", ".join(map(number, values))))
    names = ("crop_pct", "crop_mode", "interpolation")
    rows += [(name, code(described[name])) for name in names if name in described]
    rows.append(("output", f"logits of {classes(config)} classes" if classes(config) else "features"))
    rows += _cost_rows(config)
    outside = ", ".join(map(code, _outside_operators(config)))
    if outside:
        rows.append(
            ("operators of another package", f"{outside}: first import the package that registers them")
        )
    return rows


def _outside_operators(config: Json) -> list[str]:
    """Return the operators of a converted student that graftvit does not have itself."""
    if config.get("architecture") != CONVERTED:
        return []
    try:
        return sorted(
            operators_in(str(section(config, "model_args").get("plan"))) - BUILT_IN - {AS_IT_IS, NONE}
        )
    except ConfigError:  # not written by graftvit
        return []


def _cost_rows(config: Json) -> list[tuple[str, str]]:
    """Return what a copying student and the part of its teacher cost; nothing for the others."""
    cost, names = (
        section(section(config, KEY), COST),
        {"student": "the student itself", "teacher": "the part of its teacher"},
    )
    known = [(name, section(cost, key)) for key, name in names.items()]
    return [
        (name, f"{part['parameters']:,} parameters, {part['macs'] / 1e6:,.1f} M multiply-adds an image")
        for name, part in known
        if all(isinstance(part.get(key), int) for key in ("parameters", "macs"))
    ]


def _making_rows(config: Json, describe: DescribeTransfer) -> Rows:
    """Return where the weights came from and how they were trained; empty if nothing is recorded."""
    made, recipe = section(config, KEY), _recipe(config)
    if not made:
        return []
    rows = _origin("teacher", made, recipe)
    for name in section(made, "teachers"):
        rows += _origin(name, section(made, "teachers"), recipe)
    rows += lesson_rows(recipe, describe) + _origin("init", made, recipe)
    rows += _part_rows(made)
    rows += recipe_rows(recipe)
    return rows + ([("graftvit", number(made["version"]))] if made.get("version") else [])


def _part_rows(made: Json) -> list[tuple[str, str]]:
    """Return which weights of the run these are."""
    parts = {"student": "the weights", "ema": "the moving average of the weights"}
    part, step, picked = parts.get(str(made.get("part"))), made.get("step"), made.get(PICKED)
    after = "" if step is None else f" after step {number(step)}"
    best = f", the best by {code(f'test_{picked}')}" if picked else ""
    return [("what is published", f"{part}{after}{best}")] if part else []


def _origin(key: str, made: Json, recipe: Json) -> list[tuple[str, str]]:
    """Return where weights came from that it learned from (`teacher`, or the name of another) or started from
    (`init`)."""
    name = {"teacher": "teacher", "init": "start"}.get(key) or f"teacher {code(key)}"
    origin = section(made, key)
    if not origin:
        return [("start", "fresh weights")] if key == "init" and recipe else []
    rows = [(name, code(origin.get("source", "unknown")))]
    if origin.get("architecture"):
        rows.append((f"{name}: architecture", code(origin["architecture"])))
    rows.append((f"{name}: revision", code(origin["revision"]) if origin.get("revision") else "not recorded"))
    rows.append((f"{name}: license", _license_name(origin.get("license"))))
    return rows


def _license_name(license: str | None) -> str:
    return plain(normalize(license) or "unknown")


def _results(config: Json, facts: CardFacts) -> dict[str, str]:
    """Return a row of results by its heads; empty without an accuracy or a loss."""
    recorded, found = section(section(config, KEY), "results"), measured(config)
    names = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss", "epoch": "epoch"}
    shown = [key for key in names if key in found]
    if not set(shown) & {"top1", "top5", "loss"}:
        return {}
    dataset = facts.dataset_name or recorded.get("dataset")
    split = section(_recipe(config), "data").get("val_split")
    name = (code(dataset) if dataset else "not recorded") + (f", {code(split)}" if split and dataset else "")
    digits = {key: f"{found[key]:.4g}" if key in ("loss", "epoch") else f"{found[key]:.2f}" for key in shown}
    return {"data": name} | {names[key]: digits[key] for key in shown}


MARKER = "<!-- Written by graftvit push. Remove this line to keep a card that you edit. -->"
METRICS = {"top1": "Top-1 accuracy (%)", "top5": "Top-5 accuracy (%)"}


def student_card(config: Json, facts: CardFacts) -> str:
    """Return README.md for a student with this config.json, without any path of this machine.

    What is not recorded is left out, or called unknown.
    """
    config = public(config)
    made, arguments = section(config, KEY), section(config, "model_args")
    architecture = config.get("architecture")
    copies = architecture == COPIED
    architecture = arguments.get("student") if copies else architecture
    converted = architecture == CONVERTED
    recipe = dict(_recipe(config))
    values = {
        "architecture": arguments.get("architecture") if converted else architecture,
        "copied": COPIES.get(str(section(arguments, "copied").get("method"))) if copies else None,
        "copies": copies,
        "plan": arguments.get("plan") if converted else None,
        "converted": converted,
        "classes": classes(config),
        "source": section(made, "teacher").get("source"),
        "has_teacher": bool(section(made, "teacher")),
        "needs_graftvit": needs_graftvit(config, facts),
        "alone": "\n".join(load_lines(config, facts, alone=True)),
        "lines": "\n".join(load_lines(config, facts)),
        "loading": _loading_rows(config),
        "bare": BARE_WORDS if made.get(BARE) is True else "",
        "making": _making_rows(config, facts.describe_transfer),
        "settings": write_yaml(recipe) if made and recipe else "",
        "results": _results(config, facts),
        "picked": made.get(PICKED),
        "licenses": list(dict.fromkeys(map(_license_name, licenses(made)))),
        "facts": facts,
    }
    text = _template().render(head=_metadata(config, facts).to_yaml(), marker=MARKER, **values)
    return str(ModelCard(text))


@functools.cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": code, "fenced": fenced}
    text = resources.files(__package__).joinpath("model_card.txt").read_text(encoding="utf-8")
    return environment.from_string(text)


def is_generated(card: str) -> bool:
    """Return whether a card is generated and unedited: it may be replaced."""
    return MARKER in card


def hub_name(source: str) -> str | None:
    """Return the hub repository of a source of weights, None for a local one and for one that timm has elsewhere."""
    if source.startswith(("hf-hub:", "hf_hub:")):
        return source.partition(":")[2].partition("@")[0]
    try:
        published = get_pretrained_cfg(source)
    except (RuntimeError, ValueError):  # no model of timm, or none of its tags
        return None
    place = getattr(published, "hf_hub_id", None)
    if published is None or not place:
        return None
    name = ".".join(filter(None, (published.architecture, published.tag)))
    return f"{place}{name}" if place.endswith("/") else str(place)


def _metadata(config: Json, facts: CardFacts) -> ModelCardData:
    made = section(config, KEY)
    dataset = str(section(section(made, "recipe"), "data").get("dataset") or "")
    results = _eval_results(config, facts)
    transfer = ["attention-transfer"] if made.get("teacher") else []
    return ModelCardData(
        library_name="graftvit" if needs_graftvit(config, facts) else "timm",
        pipeline_tag="image-classification" if classes(config) else "image-feature-extraction",
        tags=["graftvit", "timm", "vision-transformer", *transfer],
        datasets=[dataset.removeprefix("hfds/")] if dataset.startswith("hfds/") else None,
        metrics=["accuracy"] if results else None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        **{**_bases(made), **card_fields(facts.license)},
    )


def _bases(made: Json) -> JsonDict:
    """Return the hub's repositories that the student learned from or started from.

    The hub knows adapters, merges, quantized models and finetunes; whole weights that were trained on what
    others give are the last.
    """
    further = section(made, "teachers")
    origins = [section(made, "teacher"), *(section(further, name) for name in further), section(made, "init")]
    sources = [str(origin.get("source", "")) for origin in origins]
    names = list(dict.fromkeys(name for name in map(hub_name, filter(None, sources)) if name))
    return {"base_model": names, "base_model_relation": "finetune"} if names else {}


def _eval_results(config: Json, facts: CardFacts) -> list[EvalResult]:
    """Measured accuracies."""
    made = section(config, KEY)
    recipe = section(made, "recipe")
    dataset = str(section(made, "results").get("dataset") or "")
    name, split = facts.dataset_name or dataset.rpartition("/")[2], section(recipe, "data").get("val_split")
    if not name:
        return []
    found = measured(config)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset.partition("/")[2] or dataset or name,
            dataset_name=name,
            dataset_split=split if isinstance(split, str) else None,
            metric_type="accuracy",
            metric_name=words,
            metric_value=round(found[key], 3),
        )
        for key, words in METRICS.items()
        if key in found
    ]
