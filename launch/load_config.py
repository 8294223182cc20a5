"""Build one typed configuration from defaults, a YAML file and overrides; the keys are the same in Python."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..checkpoints.files import NOT_A_URL, is_file, is_there, is_url, read_regular, safe_name
from ..models.errors import ConfigError, Json, JsonDict, check_types, did_you_mean
from ..models.plain_yaml import MAX_BYTES, YamlError, parse_yaml, write_yaml
from ..transfer.config import RunConfig
from ..transfer.engine.stages import Stage
from ..transfer.loss_config import LossConfig, describes_single_loss
from ..transfer.mode_config import MODE_FACTS, Mode
from ..transfer.setting import (
    Leaf,
    Section,
    as_inherited,
    explain,
    find_replacements,
    find_unread,
    rule_of,
    section_of_entries,
)
from .fields import check_value, find_key, find_stage_key, leaf_of, leaves, sections, unknown

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from ..transfer.analysis.compare.comparison_cells import CompareConfig, Comparison
    from ..transfer.bench_rows import Row
    from ..transfer.bench_run import Bench
    from ..transfer.config import RunConfig


# Leave out inherited settings that stronger ones deprive of their effect.
#
# A recipe may set mixup and a user another mode: what the user did not type, and does nothing any more, has
# its default. What the user typed stays, and the run refuses it if it changes nothing (`transfer/setting.py`).

Validate = Callable[[Sequence["Setting"]], RunConfig]


def without_overridden(settings: Sequence[Setting], validate: Validate) -> list[Setting]:
    """Return the settings without those that a stronger layer leaves no effect; each layer follows a weaker one."""
    kept: list[Setting] = []
    for _, group in itertools.groupby(settings, key=lambda setting: setting.layer):
        above = list(group)
        kept = _beside(kept, above, validate) + above
    return kept


def _beside(below: list[Setting], above: list[Setting], validate: Validate) -> list[Setting]:
    """Return the settings of `below` that keep their effect under those of `above`."""
    typed = {key_of(setting) for setting in above}
    try:
        below = _without(below, find_replacements(validate([*below, *above]), typed) - typed)
        after = find_unread(validate([*below, *above]))
    except ConfigError:  # a stronger layer may replace what is not valid
        return below
    gone = after.keys() - typed
    return _without(below, gone - _unread_before(below, validate)) if gone else below


def _unread_before(settings: Sequence[Setting], validate: Validate) -> set[str]:
    try:
        return set(find_unread(validate(settings)))
    except ConfigError:
        return set()


def read_elsewhere(settings: Sequence[Setting], stage: str, configs: dict[str, RunConfig]) -> list[Setting]:
    """Return the settings of a stage without those for all stages that change others and not this one."""
    own = find_unread(configs[stage]).keys()
    if not own:
        return list(settings)
    everywhere = set(own).intersection(*(find_unread(config) for config in configs.values()))
    return [
        setting
        for setting in settings
        if setting.stage == stage or setting.layer == stage or key_of(setting) not in own - everywhere
    ]


def key_of(setting: Setting) -> str:
    """Return the key of the setting, or of the mapping that it is in."""
    return leaf_of(setting.key).key


def _without(settings: Sequence[Setting], keys: Collection[str]) -> list[Setting]:
    return [setting for setting in settings if key_of(setting) not in keys]


# The recipes that come with the package: one YAML file for each published experiment.


def recipe_names() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(_recipes())


def recipe_text(name: str) -> str:
    """Return the YAML of a recipe.

    Raises:
        ConfigError: if no recipe has this name.
    """
    recipes = _recipes()
    if name not in recipes:
        there = os.path.isfile(f"{name}.yaml")  # noqa: PTH113 - Path raises for a name that is too long
        near = [f"{name}.yaml"] if there else recipes
        raise ConfigError(f"no recipe or file {name!r}; {did_you_mean(name, near)}")
    return recipes[name].read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """Return the first line of a recipe, a comment that states its origin."""
    return recipe_text(name).splitlines()[0].lstrip("# ").rstrip()


def _recipes() -> dict[str, Traversable]:
    folder = resources.files("graftvit.cfgs")
    return {entry.name[: -len(".yaml")]: entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}


@dataclass(frozen=True)
class Setting:
    """A value from the user, and its origin as an error names it (`--blr`, `my.yaml: optim.blr`)."""

    key: str
    value: Any
    origin: str
    stage: str = ""
    """Stage of the setting; empty for every stage, or for a run without stages."""
    layer: str = ""
    """File that holds the setting, or the stage in that file; empty for a flag."""
    written: bool = False
    """Of a file with all values of a run, which a run wrote: nobody gave this one."""


@check_types()
def load_config(
    source: str | Path | None = None, overrides: Json | Iterable[str | Setting] = ()
) -> RunConfig:
    """Load the configuration of a run.

    Args:
        source: A recipe's name, a YAML file, or a run folder (its `config.yaml`); only defaults if None.
        overrides: `{"optim.blr": 1e-3}`, or texts as on the command line (`"optim.blr=1e-3"`), in order.

    Raises:
        ConfigError: if a file, a key or a value is not valid.
    """
    settings = [] if source is None else read_settings(source)
    if isinstance(overrides, Mapping):
        settings += [Setting(_known(name), value, name) for name, value in overrides.items()]
    else:
        settings += [entry if isinstance(entry, Setting) else parse_override(entry) for entry in overrides]
    return _validate(without_overridden(settings, _validate))


def load_stages(source: str | Path | None, overrides: Iterable[str | Setting] = ()) -> list[Stage]:
    """Load the stages of a recipe or YAML file that has `stages:`; return an empty list for any other.

    Each stage has its own configuration. It starts from the settings above the stages; the settings of the stage
    replace them, and the overrides replace both.

    Raises ConfigError as `load_config` does, and for a stage without a name.
    """
    recipe = Recipe([]) if source is None else read_recipe(source)
    loaded = _load_parts(recipe.settings, recipe.stages, "stage", overrides)
    return [Stage(name, config) for name, config in loaded.items()]


def load_students(source: str | Path | None, overrides: Iterable[str | Setting] = ()) -> dict[str, RunConfig]:
    """Load the students of a recipe or YAML file that has `students:`, by name, as `load_stages` loads stages."""
    recipe = Recipe([]) if source is None else read_recipe(source)
    return _load_parts(recipe.settings, recipe.students, "student", overrides)


def _load_parts(
    common: Sequence[Setting],
    parts: Sequence[tuple[str, list[Setting]]],
    kind: str,
    overrides: Iterable[str | Setting],
) -> dict[str, RunConfig]:
    """Return the configuration of each part of a recipe: a stage or a student."""
    given = [entry if isinstance(entry, Setting) else parse_override(entry) for entry in overrides]
    names = [name for name, _ in parts]
    for setting in given if parts else ():
        if setting.stage and setting.stage not in names:
            raise ConfigError(
                f"{setting.origin}: there is no {kind} {setting.stage!r}; {did_you_mean(setting.stage, names)}"
            )
    settings, configs = dict[str, list[Setting]](), dict[str, RunConfig]()
    for name, own in parts:
        mine = [*common, *own, *(each for each in given if each.stage in ("", name))]
        settings[name] = without_overridden(mine, partial(_validate, stage=name))
        configs[name] = _validate(settings[name], name)
    return {name: _validate(read_elsewhere(own, name, configs), name) for name, own in settings.items()}


def dump_config(config: RunConfig) -> str:
    """Write the YAML that `load_config` reads back as the same configuration."""
    return write_yaml(config.model_dump(mode="json"))


def parse_override(text: str) -> Setting:
    """Parse `optim.blr=1e-3`, or `blr=1e-3` if the last name is unique."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            f"{text!r} is not an override; write it as section.key=value, for example optim.blr=1e-3"
        )
    return parse_setting(name, value, origin=name)


def parse_setting(name: str, text: str, origin: str) -> Setting:
    """Parse a setting whose value is still text; errors name it by `origin`."""
    found = find_key(name)
    stage, key = ("", found) if found is not None else find_stage_key(name) or ("", _known(name))
    leaf = leaf_of(key)
    check_value(key, text, origin)
    value = leaf.parse(text) if key == leaf.key else _plain_value(text)
    return Setting(key, value, origin, stage)


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe or YAML file: settings, and for each stage or student its name and its own settings."""

    settings: list[Setting]
    stages: list[tuple[str, list[Setting]]] = field(default_factory=list)
    students: list[tuple[str, list[Setting]]] = field(default_factory=list)
    compare: JsonDict | None = None
    """The section `compare`, which only `graftvit compare` reads."""
    attnbench: JsonDict | None = None
    """The section `attnbench`, which only `graftvit programs bench` reads."""


def read_settings(source: str | Path) -> list[Setting]:
    """Return the settings of a recipe or YAML file of one run, after the settings of its `base:`, if any."""
    recipe = read_recipe(source)
    for kind, parts in {"stages": recipe.stages, "students": recipe.students}.items():
        if parts:
            names = ", ".join(name for name, _ in parts)
            raise ConfigError(
                f"{source} has several {kind} ({names}): only `graftvit train` takes such a recipe"
            )
    return recipe.settings


def read_recipe(source: str | Path, seen: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe or YAML file on top of its `base:`, if any. Its stages replace those of the base."""
    label, text, folder = _read(source)
    if label in seen:
        raise ConfigError(f"{label}: base: forms a circle ({' -> '.join([*seen, label])})")
    try:
        content = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{label}: not valid YAML, {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{label}: must hold keys and values, for example 'optim: {{blr: 1e-3}}'")
    base = content.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{label}: 'base' must be the name of a recipe or a file, not {base!r}")
    inherited = Recipe([]) if base is None else read_recipe(_base_path(base, folder), (*seen, label))
    stages = _stages(content.pop("stages", None), label) or inherited.stages
    students = _students(content.pop("students", None), label) or inherited.students
    if stages and students:
        raise ConfigError(
            f"{label}: 'stages' and 'students' do not go together: give each student its recipe of stages"
        )
    compare = content.pop("compare", inherited.compare)
    attnbench = content.pop("attnbench", inherited.attnbench)
    own = _layer(content, label, label)
    return Recipe(inherited.settings + own, stages, students, compare, attnbench)


def _stages(content: Any, label: str) -> list[tuple[str, list[Setting]]]:
    if content is None:
        return []
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ConfigError(
            f"{label}: 'stages' must be a list of stages, such as '- {{name: align, mode: align}}'"
        )
    stages = list[tuple[str, list[Setting]]]()
    for number, entry in enumerate(content):
        settings = dict(entry)
        name = settings.pop("name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(
                f"{label}: stages[{number}] needs a name of letters, digits and dashes, not {name!r}"
            )
        if name in (earlier for earlier, _ in stages):
            raise ConfigError(
                f"{label}: stages[{number}] has the name {name!r} of an earlier stage: give it another"
            )
        stages.append((name, _layer(settings, f"{label}: stages.{name}", name)))
    return stages


def _students(content: Any, label: str) -> list[tuple[str, list[Setting]]]:
    if content is None:
        return []
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(own, dict) for own in content.values())
    ):
        raise ConfigError(
            f"{label}: 'students' must be a mapping of names and settings, such as "
            "'linear: {student.plan: \"*: linear\"}'"
        )
    return [
        (
            safe_name(str(name), f"{label}: students"),
            _layer(own, f"{label}: students.{name}", str(name)),
        )
        for name, own in content.items()
    ]


def _layer(content: JsonDict, label: str, layer: str) -> list[Setting]:
    """Return the settings of a file or stage. One that sets more than half of all that there are was written by a run:
    an older version knew fewer, and nobody types as many."""
    found = _flatten(content, "", label)
    written = len(found) > len(leaves()) // 2
    return [replace(setting, layer=layer, written=written) for setting in found]


def _base_path(base: str, folder: Path | None) -> str | Path:
    """Return the file `base` beside the file that names it if it exists, else the recipe's name."""
    if folder is not None and is_there(folder / base):
        return Path(os.path.normpath(folder / base))  # a circle comes back to the same name
    return base


def _read(source: str | Path) -> tuple[str, str, Path | None]:
    """Return the source's name for errors, its text, and the folder in which to look for its `base:`."""
    if is_url(source):
        raise ConfigError(f"cannot read the configuration: {source}: {NOT_A_URL}")
    path = Path(source)
    there = is_there(path)
    if there and path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    is_name = isinstance(source, str) and path.suffix not in (".yaml", ".yml") and not there
    if is_name and len(path.parts) == 1:
        return str(source), recipe_text(str(source)), None
    try:
        return str(path), read_regular(path, limit=MAX_BYTES, refusal=ConfigError), path.parent
    except ConfigError as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error


def _flatten(content: Mapping[Any, Any], prefix: str, label: str) -> list[Setting]:
    settings = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in sections():
            if not isinstance(value, dict | None):
                raise ConfigError(f"{label}: {key!r} is a section and must hold keys, not {value!r}")
            settings += _flatten(value or {}, f"{key}.", label)
        elif key in leaves():
            none = isinstance(value, str) and value.lower() == "none" and type(None) in leaves()[key].kinds
            settings.append(Setting(key, None if none else value, f"{label}: {key}"))
        else:
            raise unknown(key, extra=tuple(sections()) if not prefix else (), where=label)
    return settings


def _known(name: str) -> str:
    key = find_key(name)
    if key is None:
        raise unknown(name)
    return key


def _plain_value(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlError:
        return text


def _validate(settings: Sequence[Setting], stage: str = "") -> RunConfig:
    values: JsonDict = {}
    for setting in settings:
        if setting.stage != stage and setting.stage:  # of a run without stages
            raise unknown(setting.origin.lstrip("-"), dashes="--" if setting.origin.startswith("--") else "")
        texts = {str, Path} & {*leaf_of(setting.key).kinds}
        value = at_home(setting.value) if texts else setting.value
        _put(values, setting, value)
    try:
        config = RunConfig.model_validate(values)
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        whole = [
            replace(each, origin=each.origin.partition("[")[0]) if "[" in each.key else each
            for each in settings
        ]
        given = {leaf_of(each.key).key: each for each in whole}
        raise _explain(error.__cause__, values, given) from error
    _check_finetune(settings, config.mode)
    _check_single_loss(settings, config)
    written = {key_of(setting): setting.written for setting in settings}
    return as_inherited(config, (key for key, inherited in written.items() if inherited))


def _check_finetune(settings: Sequence[Setting], mode: Mode) -> None:
    """Raise ConfigError for `--finetune` in a mode with a teacher: it named the teacher there, and the student's
    initial weights here."""
    starts = rule_of(leaves()["student.init"].field).also
    named = [setting for setting in settings if setting.origin.lstrip("-") in starts]
    if named and MODE_FACTS[mode].taught:
        raise ConfigError(
            f"{named[-1].origin} names the teacher in the attention-transfer code, and the student's initial weights "
            f"here: give --teacher {named[-1].value} for the teacher, or --init {named[-1].value} for the student"
        )


def _check_single_loss(settings: Sequence[Setting], config: RunConfig) -> None:
    """Raise ConfigError for a typed setting of a single loss beside `transfer.losses`, even where it is a default."""
    single = {f"transfer.{name}" for name in LossConfig.model_fields}
    for setting in settings if config.transfer.losses else ():
        if not setting.layer and setting.key in single:
            raise ConfigError(describes_single_loss(setting.origin, setting.key.rpartition(".")[2]))


def at_home(value: Any) -> Any:
    """Replace a leading `~` of a path by the home folder; a shell does not do so in `--output_dir=~/x`."""
    if not isinstance(value, str | Path):
        return value
    scheme, mark, path = str(value).rpartition("local-dir:")
    return type(value)(scheme + mark + os.path.expanduser(path))  # noqa: PTH111 - keeps an unknown user as it is


def _put(values: JsonDict, setting: Setting, value: Any) -> None:
    """Set `values[first][second]...` of a dotted key; copy on the way, so that a caller's values do not change.

    Raises ConfigError: the key is of an entry that the list does not have.
    """
    *path, last = setting.key.split(".")
    for part in path:
        name, _, index = part.rstrip("]").partition("[")
        below = values.get(name)
        if not index:
            values[name] = dict(below) if isinstance(below, Mapping) else {}
            values = values[name]
            continue
        entries = list(below) if isinstance(below, list | tuple) else []
        if int(index) >= len(entries) or not isinstance(entries[int(index)], Mapping):
            raise ConfigError(
                f"{setting.origin}: there is no entry {index} in {name}, which has {len(entries)}, counted from 0"
            )
        values[name], entries[int(index)] = entries, dict(entries[int(index)])
        values = entries[int(index)]
    values[last] = value


def _explain(error: ValidationError, values: JsonDict, given: Mapping[str, Setting]) -> ConfigError:
    """Return pydantic's findings as one sentence for each setting: its name, its value, what is valid."""
    sentences: dict[str, str] = {}
    for finding in error.errors():
        path = [str(part) for part in finding["loc"]]
        key = next((".".join(path[:n]) for n in (2, 1) if ".".join(path[:n]) in given), "")
        if not key:
            sentences[finding["msg"]] = finding["msg"].removeprefix("Value error, ")
            continue
        inner = finding["loc"][key.count(".") + 1 :]
        section = section_of_entries(leaf_of(key).field.annotation)
        if section is not None and len(inner) > 1:
            place = given[key].origin + (f"[{inner[0]}]" if isinstance(inner[0], int) else f".{inner[0]}")
            sentences[f"{place}.{inner[1]}"] = _explain_entry(finding, inner, section, place)
            continue
        value: Any = values
        for name in key.split("."):
            value = value[name]
        if finding["type"] == "value_error":
            sentences[key] = (
                f"{given[key].origin} is {value!r}: {finding['msg'].removeprefix('Value error, ')}"
            )
            continue
        sentences[key] = leaf_of(key).refusal(given[key].origin, value)
    return ConfigError("; ".join(sentences.values()))


def _explain_entry(
    finding: ErrorDetails, inner: Sequence[int | str], section: type[Section], place: str
) -> str:
    """Return a finding within an entry of a list or mapping, such as `--losses[0].weight`, as one sentence."""
    name = str(inner[1])
    if finding["type"] == "extra_forbidden":
        return f"{place} has an unknown key {name!r}; {did_you_mean(name, section.model_fields)}"
    if len(inner) > 2 and name in section.model_fields:  # of one of several kinds, or within a list
        return f"{place}.{name} is not {Leaf(name, section.model_fields[name]).valid()}"
    message = finding["msg"].removeprefix("Value error, ").removeprefix("Input ")
    field = section.model_fields.get(name)
    near = (
        None
        if field is None or isinstance(finding["input"], list)
        else Leaf(name, field).nearest(finding["input"])
    )
    hint = f"did you mean {near!r}? It" if near else "but"
    return f"{place}.{name} is {finding['input']!r}, {hint} {message}"


# Read a comparison from a YAML file with a section `compare`.

Model = TypeVar("Model", bound=BaseModel)


def load_bench(source: str | Path, overrides: Iterable[Setting] = ()) -> Bench:
    """Load the benchmark of a recipe or YAML file. Raises ConfigError: it has no valid section `attnbench`."""
    from ..transfer.bench_run import Bench, BenchConfig

    remedy = "add attnbench: {backbones: {...}, data: {...}}, or take the recipe attnbench_digits"
    settings = _read_section(BenchConfig, read_recipe(source).attnbench, "attnbench", source, remedy)
    bench = Bench(str(source), load_config(source, overrides), settings)
    for backbone in settings.backbones:
        for data in settings.data:
            bench.run_config(backbone, data)
    return bench


def _read_section(
    kind: type[Model], values: JsonDict | None, name: str, source: str | Path, remedy: str
) -> Model:
    """Return the section of a recipe. Raises ConfigError: it is missing or not valid."""
    if values is None:
        raise ConfigError(f"{source} has no section {name!r}; {remedy}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, kind, name)}") from error


def load_rows(source: Path) -> list[Row]:
    """Return the rows of a file, or those that come with the recipe of this name. Raises ConfigError as `read_rows`."""
    from ..transfer.bench_rows import read_rows

    shipped = resources.files("graftvit.cfgs") / f"{source}.jsonl"
    if source.exists() or len(source.parts) != 1 or not shipped.is_file():
        return read_rows(source)
    with resources.as_file(shipped) as path:
        return read_rows(path, str(source))


FOR_THE_TEACHER = ("engine.device", "data.data_path", "data.stage", "data.workers", "data.download")
"""The settings of the comparison that also hold for the run that trains the teacher."""


def load_compare(source: str | Path) -> CompareConfig:
    """Load the section `compare` of a recipe or YAML file. Raises ConfigError: it is missing or not valid."""
    from ..transfer.analysis.compare.comparison_cells import CompareConfig

    remedy = "add compare: {plans: {linear: '*: linear', ...}}, or take the recipe digits_compare"
    return _read_section(CompareConfig, read_recipe(source).compare, "compare", source, remedy)


def load_comparison(source: str | Path, overrides: Iterable[Setting] = ()) -> Comparison:
    """Load the comparison of a recipe or YAML file. A file without `stages:` is one stage, named by its mode.

    Raises ConfigError if the file has no section `compare` or is not valid.
    """
    from ..transfer.analysis.compare.comparison_cells import Comparison, check_stages
    from ..transfer.engine.stages import Stage

    given, compare = list(overrides), load_compare(source)
    stages = load_stages(source, given)
    if not stages:
        config = load_config(source, given)
        stages = [Stage(config.mode, config)]
    for stage in stages:
        if stage.config.dense.head is not None:
            raise ConfigError(
                f"{source}: dense.head={stage.config.dense.head} makes no classifier, and a comparison is of these"
            )
        if not stage.config.facts.classifies:
            raise ConfigError(
                f"{source}: stage {stage.name} has mode {stage.config.mode}, which has no accuracy to compare"
            )
    check_stages(compare, [stage.name for stage in stages])
    if compare.teacher_recipe is None:
        return Comparison([Stage(stage.name, _settle(stage.config)) for stage in stages], compare)
    folder = stages[0].config.output_dir / "teacher"
    teacher = load_config(_find_recipe(compare.teacher_recipe, Path(source)), _take_over(given, folder))
    found = {"source": f"local-dir:{folder / 'student'}"}
    settled = []
    for stage in stages:
        config = stage.config
        if config.reads_teacher:
            config = config.model_copy(update={"teacher": config.teacher.model_copy(update=found)})
        settled.append(Stage(stage.name, _settle(config, teacher)))
    return Comparison(settled, compare, teacher)


def _settle(config: RunConfig, made: RunConfig | None = None) -> RunConfig:
    """Return the settings of a stage with its student's architecture, size and pooling.

    `made` is the run that makes the teacher, which may not be there yet.
    """
    from ..transfer.engine.build import settled
    from ..transfer.engine.students import settle_student

    if made is None or not config.follows_teacher:
        return settled(config)
    return config.model_copy(update={"student": settle_student(config.student, _settle(made).student)})


def _find_recipe(recipe: str, source: Path) -> str | Path:
    """Return the recipe of the teacher: a file beside the file that names it, as for `base:`, or a recipe's name."""
    path = source.parent / recipe
    return path if is_file(path) and path != source and source.is_file() else recipe


def _take_over(given: Iterable[Setting], folder: Path) -> list[Setting]:
    """Return the given settings that also hold for the teacher's run, and the settings of its folder and display."""
    kept = [setting for setting in given if setting.key in FOR_THE_TEACHER]
    return [
        *kept,
        Setting("output_dir", str(folder), "output_dir"),
        Setting("engine.progress", False, "engine.progress"),
    ]
