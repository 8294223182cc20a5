"""Write the tables of settings, recipes, methods, operators, kits and models in `docs/`, and the schema of
recipes: `make docs`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
from graftvit.launch.commands.list import class_of, read_equation, write_in_a_plan
from graftvit.launch.fields import leaves, sections, short_names
from graftvit.launch.load_config import recipe_names, recipe_summary
from graftvit.launch.schema import schema_text
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import check_supported, family_of
from graftvit.models.layer_plan import OPERATORS
from graftvit.models.programs.program import FOUND
from graftvit.models.small import without_memory
from graftvit.transfer.kits import load_kits
from graftvit.transfer.methods.method_facts import LAYERS, METHODS
from graftvit.transfer.methods.mismatch import describe_stages
from graftvit.transfer.methods.registry import find_method
from graftvit.transfer.setting import Leaf, OneOf, rule_of
from torch import nn

DOCS = Path(__file__).parent.parent / "docs"
MARKED = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "| key | flag | default | meaning |\n| --- | --- | --- | --- |\n"


def render_settings() -> str:
    """Return a table for each section, in the order of the configuration."""
    titles = {"": "### The run\n"} | {
        name: f"### {name}\n\n{' '.join((section.__doc__ or '').partition('Args:')[0].split())}\n"
        for name, section in sections().items()
    }
    parts = [
        f"\n{title}\n{HEAD}" + "".join(render_row(leaf) for leaf in leaves().values() if leaf.section == name)
        for name, title in titles.items()
    ]
    return "".join(parts) + "\n"


def render_row(leaf: Leaf) -> str:
    short = [f"`--{name}`" for name, key in short_names().items() if key == leaf.key]
    see = rule_of(leaf.field).see
    meaning = mark_code(str(leaf.field.description)) + (f" ({see})" if see else "")
    listed_there = see and any(isinstance(each, OneOf) for each in leaf.field.metadata)
    valid = leaf.valid() if leaf.valid().startswith("one of") and not listed_there else ""
    meaning += f" ({valid})" if valid else ""
    return (
        f"| `{leaf.key}` | {', '.join(short) or f'`--{leaf.key}`'} | {render_default(leaf)} | {meaning} |\n"
    )


def render_default(leaf: Leaf) -> str:
    value = leaf.field.default
    if leaf.is_switch:
        return "on" if value else "off"
    if isinstance(value, tuple) and value:
        value = ",".join(map(str, value))
    return "none" if value is None else "empty" if value == "" else f"`{value}`"


def mark_code(text: str) -> str:
    """Mark dotted keys and words such as `aa=none` as code."""
    return re.sub(r"(?<![\w./])(\w+=\w+|(?:data|student|teacher|transfer)\.\w+)(?![\w.])", r"`\1`", text)


def render_methods() -> str:
    """Return a row for each method: what it does by default, and what it reads beside layers, weight and reduction."""
    columns = ["`transfer.method`", "what it does by default", "settings of its own", "teacher at inference"]
    head = f"\n| {' | '.join(columns)} |\n| --- | --- | --- | --- |\n"
    return head + "".join(map(render_method, METHODS)) + "\n"


def render_method(name: str) -> str:
    own = [f"`{setting}`" for setting in sorted((METHODS[name].reads or set()) - LAYERS)]
    teacher = "a part, in the student" if METHODS[name].copies else "none"
    return f"| `{name}` | {find_method(name).describe({})} | {', '.join(own)} | {teacher} |\n"


def render_kits() -> str:
    """Return a row for each kit: its recipes, the published number, and what it costs."""
    rows = ["| kit | recipes | top-1 | source | V100 hours |", "| --- | --- | ---: | --- | ---: |"]
    for name, kit in load_kits().items():
        recipes, published = ", ".join(f"`{recipe}`" for recipe in kit.recipes), kit.published
        number = f"{published.top1} ± {published.tolerance}"
        rows.append(f"| `{name}` | {recipes} | {number} | {published.source} | {kit.gpu_hours:,.0f} |")
    return "\n".join(["", *rows, "", ""])


def render_recipes() -> str:
    """Return a row for each recipe: its name, and its first line."""
    rows = [f"| `{name}` | {recipe_summary(name)} |" for name in recipe_names()]
    return "\n".join(["", "| recipe | what it is |", "| --- | --- |", *rows, "", ""])


def render_operators() -> str:
    """Return a section for each class of operators: its equation and source, and how a plan names them."""
    names: dict[Callable[..., object], list[str]] = {}
    for name, operator in OPERATORS.items():
        names.setdefault(class_of(operator), []).append(name)
    return "\n" + "".join(render_operator(kind, names[kind]) for kind in names)


def render_operator(kind: Callable[..., object], names: list[str]) -> str:
    text = re.sub(r"^([a-z]+(?:, [a-z]+)*): +", r"- **\1**: ", read_equation(kind), flags=re.MULTILINE)
    lines = [f"{name}: {FOUND[name]}" if name in FOUND else write_in_a_plan(name) for name in names]
    heading = ", ".join(name for name in names if name not in FOUND)
    return "\n".join([f"## {heading}", "", text, "", "```text", *lines, "```", "", ""])


# The models of timm, module by module.


def timm_modules() -> list[str]:
    """Return timm's own modules that have models with attention over tokens or channels."""
    names = {module: names_of(module) for module in sorted(timm.list_modules())}
    own = (module for module, models in names.items() if models and _is_timms(models[0]))
    return [module for module in own if _has_attention(outlined(names[module][0]))]


def names_of(module: str) -> list[str]:
    """Return the models of a module without those of `support.models.tiny_families`."""
    return timm.list_models(module=module, exclude_filters="free_*")


def _is_timms(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("timm.")


def _has_attention(model: nn.Module) -> bool:
    kinds = {type(part).__name__.lower() for part in model.modules()}
    return any("attention" in kind or "attn" in kind for kind in kinds)


def outlined(name: str) -> nn.Module:
    """Return a model of timm without memory for its weights."""
    with without_memory():
        return timm.create_model(name)


def refusal(name: str) -> str:
    """Return why the attention of a model is not taken; empty where it is."""
    try:
        check_supported(outlined(name))
    except UnsupportedModelError as error:
        return str(error).partition("; supported")[0]
    return ""


CANNOT = {
    "none": "the plan word `none`",
    "without": "`--without`",
    "copying": "methods that copy",
    "masking": "`mode=pretrain`",
    "measuring": "distances of maps as a metric",
    "mirroring": "`student.mirror_teacher`",
}
"""What a family cannot, in words of a user."""


def render_models() -> str:
    """Return a row for each module of timm of whose models attention is taken, and the names of the others."""
    rows, others = (
        ["| timm module | models | a token attends to | refused |", "| --- | --- | --- | --- |"],
        [],
    )
    for module in timm_modules():
        names = names_of(module)
        taken = [name for name in names if not refusal(name)]
        if taken:
            rows.append(f"| `{module}` | {len(taken)} of {len(names)} | {describe_maps(taken[0])} |")
        else:
            others.append(f"`{module}`")
    return "\n".join(["", *rows, "", f"Other modules with attention: {', '.join(others)}.", "", ""])


def describe_maps(name: str) -> str:
    """Return the structure of the maps of a model, stage by stage, and what is refused for it."""
    model = outlined(name)
    family = family_of(model)
    family.resize(model, family.image_size(model) or (224, 224))
    maps = dict.fromkeys(describe_stages(model)["attends to"].split(", "))
    return f"{', then '.join(maps)} | {', '.join(CANNOT[word] for word in family.cannot)}"


PAGES = {
    "configuration.md": render_settings,
    "recipes.md": render_recipes,
    "operators.md": render_operators,
    "transfer.md": render_methods,
    "reproduce.md": render_kits,
}
SLOW_PAGES = {"models.md": render_models}
"""By page: what its marked table holds."""


def main(names: Sequence[str]) -> None:
    """Write the tables of pages, by default of all but the slow ones, and the schema."""
    for name in names or PAGES:
        text, render = (DOCS / name).read_text(), {**PAGES, **SLOW_PAGES}[name]
        (DOCS / name).write_text(MARKED.sub(lambda _, render=render: render(), text))
    (DOCS.parent / "cfgs" / "schema.json").write_text(schema_text())


if __name__ == "__main__":
    main(sys.argv[1:])
