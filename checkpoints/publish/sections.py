"""Write the sections of a model card from a student's config.json; leave out or call unknown what is not recorded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from ...models.conversion import ARCHITECTURE as CONVERTED
from ...models.copied import ARCHITECTURE as COPIED
from ...models.copying.copying_operators import COPIES
from ...models.errors import ConfigError, Json
from ...models.layer_plan import AS_IT_IS, BUILT_IN, NONE, operators_in
from ...models.plain_yaml import write_yaml
from ..copying_students import BARE_WORDS
from ..licenses import normalize
from ..markdown import code, fenced, plain
from ..provenance import BARE, COST, KEY, PICKED, licenses
from ..timm_models import is_ours
from .card_text import DescribeTransfer, lesson_rows, number, plain_transfer, recipe_rows, section, table


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
    rows.append((f"{name}: license", _named(origin.get("licence"))))
    return rows


def _named(license: str | None) -> str:
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
    sources = [_named(source) for source in licenses(section(config, KEY))]
    made_of = (
        f"The weights that it was made from are under: {', '.join(dict.fromkeys(sources))}."
        if sources
        else ""
    )
    known = f"{code(license)}." if license else "Unknown. Ask the owner before you use it."
    return f"{known} {made_of}".strip()
