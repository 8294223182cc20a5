"""Write the model card of a student: metadata that the hub reads, and how the student was made, in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

from ...models.conversion import ARCHITECTURE as CONVERTED
from ...models.copied import ARCHITECTURE as COPIED
from ...models.copying.copying_operators import COPIES
from ...models.errors import CheckpointError, ConfigError, Json, JsonDict
from ...models.layer_plan import BUILT_IN
from ...models.plain_yaml import write_yaml
from ...models.plan_syntax import AS_IT_IS, NONE, operators_in
from ..architecture import is_ours
from ..copying_students import BARE_WORDS
from ..licenses import (
    NAMED,
    card_fields,
    carried,
    check_named,
    check_shareable,
    normalize,
    public,
    recorded_mode,
)
from ..markdown import code, fenced, plain
from ..provenance import BARE, COST, KEY, PICKED, licenses

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


# Write the sections of a model card from a student's config.json; leave out or call unknown what is not recorded.


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
    dataset_name: str | None = None
    """A pretty name of the data that was evaluated on."""
    describe_transfer: DescribeTransfer = plain_transfer

    @property
    def name(self) -> str:
        """The repository without its owner."""
        return self.repository.rpartition("/")[2]


def body(config: Json, facts: CardFacts) -> str:
    """Return all sections as Markdown. `config` holds no path of this machine any more (`public`)."""
    sections = {
        f"# {facts.name}": _summary(config, facts),
        "## How to load": _loading(config, facts),
        "## How it was made": _making(config, facts.describe_transfer),
        "## Results": _results(config, facts),
        "## Intended use and limits": _limits(config),
        "## License": _license(config, facts.license),
    }
    return "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items()) + "\n"


def load_lines(config: Json, facts: CardFacts) -> list[str]:
    """Return the three lines of Python that load the model from the hub, with timm alone if possible."""
    source = json.dumps(f"hf-hub:{facts.repository}" + (f"@{facts.revision}" if facts.revision else ""))
    prepared = "timm.data.resolve_model_data_config(model)"
    transform = f"transform = timm.data.create_transform(**{prepared}, is_training=False)"
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


def _summary(config: Json, facts: CardFacts) -> str:
    arguments = section(config, "model_args")
    architecture = config.get("architecture")
    copying = architecture == COPIED
    architecture = arguments.get("student") if copying else architecture
    converted = architecture == CONVERTED
    architecture = arguments.get("architecture") if converted else architecture
    count = facts.parameters or 0
    size = f", {count / 1e6:.1f} M parameters" if count >= 1e6 else f", {count:,} parameters" if count else ""
    use = (
        f"that sorts images into {classes(config)} classes"
        if classes(config)
        else "that gives image features"
    )
    lines = [f"A vision transformer ({code(architecture)}{size}) {use}."]
    source = section(section(config, KEY), "teacher").get("source")
    if source:
        lines.append(f"It learned from a frozen teacher, {code(source)}.")
    if copying:
        kind = COPIES.get(str(section(arguments, "copied").get("method")))
        words = "parts of its attention" if kind is None else kind.words
        lines.append(f"It runs with {words}, and holds the part of the teacher that this takes.")
    if converted:
        lines.append(f"Its attention was converted: {code(arguments.get('plan'))}.")
    return " ".join(lines)


def _loading(config: Json, facts: CardFacts) -> str:
    described = section(config, "pretrained_cfg")
    needs = f"`pip install {'graftvit' if needs_graftvit(config, facts) else 'timm'}`, then:"
    rows = [("architecture", code(config.get("architecture")))] if config.get("architecture") else []
    size = described.get("input_size")
    if isinstance(size, list):
        rows.append(("input (channels x height x width)", " x ".join(map(number, size))))
    for name in ("mean", "std"):
        values = described.get(name)
        if isinstance(values, list):
            rows.append((f"{name} of each channel", ", ".join(map(number, values))))
    for name in ("crop_pct", "crop_mode", "interpolation"):
        if name in described:
            rows.append((name, code(described[name])))
    rows.append(("output", f"logits of {classes(config)} classes" if classes(config) else "features"))
    block = fenced("\n".join(load_lines(config, facts)), "python")
    rows += _cost_rows(config)
    outside = ", ".join(map(code, _outside_operators(config)))
    if outside:
        rows.append(
            ("operators of another package", f"{outside}: first import the package that registers them")
        )
    note = f"**It is {BARE_WORDS}.**" if _is_bare(config) else ""
    return f"{needs}\n\n{block}\n\n{table(rows)}\n{note}"


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


def _is_bare(config: Json) -> bool:
    return section(config, KEY).get(BARE) is True


def _making(config: Json, describe: DescribeTransfer) -> str:
    made = section(config, KEY)
    if not made:
        return "Nothing is recorded of how it was made."
    recipe = _recipe(config)
    rows = _origin("teacher", made, recipe)
    for name in section(made, "teachers"):
        rows += _origin(name, section(made, "teachers"), recipe)
    rows += lesson_rows(recipe, describe) + _origin("init", made, recipe)
    rows += _part_rows(made)
    rows += recipe_rows(recipe)
    rows += [("graftvit", number(made["version"]))] if made.get("version") else []
    return f"{table(rows)}\n{_fold(recipe)}" if rows else "Nothing is recorded of how it was made."


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
    rows.append((f"{name}: license", _license_name(origin.get("licence"))))
    return rows


def _license_name(license: str | None) -> str:
    return plain(normalize(license) or "unknown")


def _fold(recipe: Json) -> str:
    if not recipe:
        return ""
    text = write_yaml(dict(recipe))
    return f"<details>\n<summary>All settings</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _results(config: Json, facts: CardFacts) -> str:
    recorded, found = section(section(config, KEY), "results"), measured(config)
    names = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss", "epoch": "epoch"}
    shown = [key for key in names if key in found]
    if not set(shown) & {"top1", "top5", "loss"}:
        return "No results are recorded."
    dataset = facts.dataset_name or recorded.get("dataset")
    split = section(_recipe(config), "data").get("val_split")
    name = (code(dataset) if dataset else "not recorded") + (f", {code(split)}" if split and dataset else "")
    values = (f"{found[key]:.4g}" if key in ("loss", "epoch") else f"{found[key]:.2f}" for key in shown)
    results = table([(name, *values)], "data", *(names[key] for key in shown))
    by = "Measured by the run that trained it"
    if section(config, KEY).get(PICKED):
        by += ", on the images that this state was picked by: expect a little less on others"
    return f"{results}\n{by}."


def _limits(config: Json) -> str:
    if classes(config):
        use = f"To sort images into its {classes(config)} classes, and as a start for fine-tuning."
    else:
        use = "As image features, and as a start for fine-tuning."
    limits = ["Images must be prepared as above; `transform` does it."]
    if _is_bare(config):
        limits.append(f"It is {BARE_WORDS}: it does not compute what it was trained to compute.")
    if section(config, KEY).get("teacher"):
        limits.append(
            "What is wrong with the teacher, or with the data that it saw, may be wrong with it too."
        )
    limits.append("Nothing is recorded of how it does on other data, or of its biases.")
    return use + "\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _license(config: Json, license: str | None) -> str:
    sources = [_license_name(source) for source in licenses(section(config, KEY))]
    made_of = (
        f"The weights that it was made from are under: {', '.join(dict.fromkeys(sources))}."
        if sources
        else ""
    )
    known = f"{code(license)}." if license else "Unknown. Ask the owner before you use it."
    return f"{known} {made_of}".strip()


MARKER = "<!-- Written by graftvit push. Remove this line to keep a card that you edit. -->"
METRICS = {"top1": "Top-1 accuracy (%)", "top5": "Top-5 accuracy (%)"}


def student_card(config: Json, facts: CardFacts) -> str:
    """Return README.md for a student with this config.json, without any path of this machine."""
    config = public(config)
    head = _metadata(config, facts).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n{MARKER}\n\n{body(config, facts)}"))


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
