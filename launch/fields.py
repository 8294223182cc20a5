"""The settings of a run as the command line sees them: their names, their parsing and their valid values."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection

from ..models.errors import ConfigError, did_you_mean
from ..transfer.config import RunConfig
from ..transfer.setting import Leaf, Section, fields_of, is_section, rule_of, section_of_entries

# Words of the command lines of MAE and of the attention transfer code that have another name or no counterpart here.
#
# `docs/from-attention-transfer.md` has the same table for readers. Names that mean the same here stand beside their
# settings (`also`).

FLAGS = {
    "end_layer": "give --layers: --layers :-6 leaves the last 6 layers out (the other code reads --end_layer and never "
    "uses it)",
    "beta2": "give both betas: --betas 0.9,0.95",
    "cls_token": "give --student.global_pool token",
    "train_qkv": "give --trainable 'qkv|fc_norm'; the head always learns",
    "use_teacher_ema": "name the average in the source: --teacher FILE#ema",
    "dataset_name": "give --dataset, such as folder or torch/cifar10, and --data_path",
    "eval": "`graftvit evaluate SOURCE --data_path DIR` evaluates a model",
    "dist_eval": "leave it out: all processes share every evaluation, and each image counts once",
    "log_dir": "leave it out: curves are written to output_dir",
    "job_dir": "give --output_dir",
    "start_epoch": "leave it out: a run resumes where it stopped",
    "pin_mem": "leave it out: memory is pinned for a GPU",
    "no_pin_mem": "leave it out: memory is pinned for a GPU",
    "world_size": "leave it out: torchrun, srun or `graftvit submit --nodes N` set the number of processes",
    "local_rank": "leave it out: torchrun, srun or `graftvit submit` set it",
    "dist_on_itp": "leave it out: torchrun, srun or `graftvit submit` start the processes",
    "dist_url": "leave it out: torchrun, srun or `graftvit submit` set the address",
    "ngpus": "give `graftvit submit ... --tasks_per_node N`",
    "remode": "leave it out: erased pixels are noise, which is its value 'pixel'",
    "recount": "leave it out: one region is erased, which is its value 1",
    "resplit": "leave it out",
    "cutmix_minmax": "give --cutmix, the alpha of the ratio",
    "mixup_prob": "leave it out: every batch is mixed, which is its value 1.0",
    "mixup_switch_prob": "leave it out: half of the batches use CutMix where both are on, which is its value 0.5",
    "mixup_mode": "leave it out: a batch is mixed as a whole, which is its value 'batch'",
    "norm_pix_loss": "leave it out: it is on by default; --no-norm_pixels turns it off",
}
"""By flag: what to write instead."""
OFFICIAL_METHODS = ("copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v")


def check_value(key: str, value: str, origin: str) -> None:
    """Raise ConfigError for a value of the other code, in its words; None of ours is refused."""
    instead = ""
    if key == "mode" and value in OFFICIAL_METHODS:
        instead = f"give --mode transfer --method {value}"
    if key == "student.model" and value.startswith("dual_vit_"):
        size = value.removeprefix("dual_vit_").partition("_")[0]
        instead = f"give --teacher SOURCE and --model vit_{size}_patch16_224"
    if key == "engine.resume" and value == "allow":
        instead = "give --resume auto, the default"
    if instead:
        raise ConfigError(f"{origin} is {value!r}, a value of the attention-transfer code: {instead}")


ENTRY = re.compile(r"(?P<list>[\w.-]+)\[(?P<index>\d+)\]\.(?P<name>\w+)")
"""A setting within an entry of a list, such as `transfer.losses[0].weight`."""


@functools.cache
def leaves() -> dict[str, Leaf]:
    """Return every setting of a run by its dotted key, in the order of `transfer/config.py`."""
    return {key: Leaf(key, field) for key, field in fields_of(RunConfig).items()}


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Return the sections of a run by name, in order."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if is_section(field.annotation)
    }


@functools.cache
def short_names() -> dict[str, str]:
    """Return the short names and their keys: the last part of each key where it is unique, and further names."""
    owners: dict[str, list[str]] = {}
    for leaf in leaves().values():
        owners.setdefault(leaf.name, []).append(leaf.key)
    further = {name: key for key, leaf in leaves().items() for name in rule_of(leaf.field).also}
    return {name: keys[0] for name, keys in owners.items() if len(keys) == 1} | further


def find_key(name: str) -> str | None:
    """Return the dotted key that `name` means, or None. Dashes are underscores; keys inside a mapping are valid.

    So is a setting of an entry that exists in a list: `losses[0].weight` means `transfer.losses[0].weight`.
    """
    name = name.replace("-", "_")
    entry = ENTRY.fullmatch(name)
    if entry is not None:
        key, section = find_key(entry["list"]), _section_of_entries(entry)
        valid = section is not None and entry["name"] in section.model_fields
        return f"{key}[{entry['index']}].{entry['name']}" if valid else None
    if name in leaves():
        return name
    if name in short_names():
        return short_names()[name]
    above = name.rpartition(".")[0]
    while above:
        if above in leaves():
            return name if leaves()[above].is_mapping else None
        above = above.rpartition(".")[0]
    return None


def _section_of_entries(entry: re.Match[str]) -> type[Section] | None:
    key = find_key(entry["list"])
    return (
        section_of_entries(leaves()[key].field.annotation)
        if key in leaves() and not leaves()[key].is_mapping
        else None
    )


def find_stage_key(name: str) -> tuple[str, str] | None:
    """Return the stage and the key that `align.epochs` or `align.optim.epochs` means, or None."""
    stage, _, rest = name.replace("-", "_").partition(".")
    key = find_key(rest) if rest else None
    return None if key is None else (stage, key)


def leaf_of(key: str) -> Leaf:
    """Return the setting of a key that `find_key` returned; for a key inside a mapping or a list, that of the whole."""
    key = key.partition("[")[0]
    while key not in leaves():
        key = key.rpartition(".")[0]
    return leaves()[key]


def unknown(
    name: str,
    *,
    dashes: str = "",
    extra: tuple[str, ...] = (),
    where: str = "",
    keys: Collection[str] | None = None,
    command: str = "graftvit train",
) -> ConfigError:
    """Return the error for an unknown key or flag: one sentence that names the nearest valid one.

    Args:
        name: What the user wrote, without its dashes.
        dashes: `--` for a flag.
        extra: More valid names: the flags of the command itself.
        where: The file that contains the key.
        keys: The settings that the command takes; by default all.
        command: The command whose help lists what is valid.
    """
    keys = leaves() if keys is None else keys
    short = [flag for flag, key in short_names().items() if key in keys]
    kind = "flag" if dashes else "key"
    start = f"{where}: unknown {kind} {dashes + name!r}" if where else f"unknown {kind} {dashes + name!r}"
    plain = name.replace("-", "_")
    if plain in FLAGS:
        return ConfigError(f"{start} of the attention-transfer code: {FLAGS[plain]}")
    entry = ENTRY.fullmatch(plain)
    section = None if entry is None else _section_of_entries(entry)
    if entry is not None and section is not None:
        return ConfigError(f"{start}; {did_you_mean(entry['name'], section.model_fields)}")
    homonyms = [key for key in keys if key.rpartition(".")[2] == plain.rpartition(".")[2]]
    if len(homonyms) > 1:
        return ConfigError(f"{start}: write {' or '.join(dashes + key for key in homonyms)}")
    if homonyms:
        return ConfigError(f"{start}, did you mean {dashes + homonyms[0]!r}?")
    nearest = difflib.get_close_matches(plain, [*extra, *short, *keys], n=1, cutoff=0.6)
    if not nearest and "." in plain:
        nearest = difflib.get_close_matches(plain.rpartition(".")[2], short, n=1, cutoff=0.6)
    if nearest:
        known = nearest[0] if dashes or nearest[0] in extra else short_names().get(nearest[0], nearest[0])
        return ConfigError(f"{start}, did you mean {dashes + known!r}?")
    return ConfigError(f"{start}; `{command} --help` lists the valid ones")
