"""Damage: what happens to bytes, to tables of tensors, to JSON and to text on a disk, by accident or on purpose."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from support.files.hostile_configs import WRONG, changed, places
from torch import Tensor

SPARSE = 5 << 30
Damage = Callable[[Random, bytearray], None]


def _place(rng: Random, size: int) -> int:
    """A position; the two ends, where files describe themselves, are hit more often than the numbers between."""
    near = min(size, 1500)
    return (
        rng.choice([rng.randrange(size), rng.randrange(near), size - 1 - rng.randrange(near)]) if size else 0
    )


def flip(rng: Random, content: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        if content:
            content[_place(rng, len(content))] ^= 1 << rng.randrange(8)


def overwrite(rng: Random, content: bytearray) -> None:
    start, length = _place(rng, len(content)), rng.randint(1, 16)
    content[start : start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])


def insert(rng: Random, content: bytearray) -> None:
    start = _place(rng, len(content))
    content[start:start] = rng.randbytes(rng.randint(1, 64))


def cut(rng: Random, content: bytearray) -> None:
    start = _place(rng, len(content))
    del content[start : start + rng.choice([1, 8, 100, len(content)])]


def splice(rng: Random, content: bytearray) -> None:
    start, end = sorted((_place(rng, len(content)), _place(rng, len(content))))
    part = content[start : min(end, start + 4096)]
    there = _place(rng, len(content))
    content[there : there + (len(part) if rng.random() < 0.5 else 0)] = part


def lie_about_length(rng: Random, content: bytearray) -> None:
    """Eight bytes, at the start or anywhere, that say how much follows."""
    start = rng.choice([0, _place(rng, len(content))])
    length = rng.choice(
        [0, 1, len(content), len(content) * 2, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    )
    content[start : start + 8] = struct.pack("<Q", length)


DAMAGES: tuple[Damage, ...] = (flip, overwrite, insert, cut, splice, lie_about_length)


def damage_bytes(rng: Random, path: Path) -> str:
    """Changes a file in place and says how; one time in thirty it becomes sparse and five gigabytes long."""
    if rng.random() < 1 / 30:
        with path.open("r+b") as file:
            file.truncate(SPARSE)
        return "sparse"
    content, done = bytearray(path.read_bytes()), []
    if rng.random() < 0.25:  # one number, as a bad disk changes it
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return "one bit"
    for damage in rng.choices(DAMAGES, k=rng.randint(1, 3)):
        damage(rng, content)
        done.append(damage.__name__)
    path.write_bytes(content)
    return "+".join(done)


def damage_tensors(rng: Random, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A table of tensors with one of them of another name, kind, shape or value, gone or there twice."""
    name = rng.choice(sorted(tensors))
    tensor, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    how = rng.choice(
        ["rename", "drop", "twice", "kind", "shape", "value", "odd name", "many", "empty", "nothing", "wide"]
    )
    if how == "value":
        value = rng.choice([float("nan"), float("inf"), -float("inf"), 1e300, 1e39, -3e38, 1e-300])
        tensor = tensor.double()
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
    elif how == "kind":
        tensor = tensor.to(
            rng.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])
        )
    elif how == "shape":
        tensor = rng.choice(
            [tensor[None], tensor.flatten(), tensor[..., :1], tensor.new_zeros(0), tensor.sum()]
        )
    elif how == "wide":
        return {key: value.double() for key, value in tensors.items()}, how
    named = {
        "rename": {f"{name}{rng.choice(['x', '.', '_'])}": tensor},
        "drop": {},
        "twice": {name: tensor, f"module.{name}": tensor + 1},
        "odd name": {rng.choice(["", "\x1b[2J", "a" * 200_000, "../x", "blocks.99999999999.attn"]): tensor},
        "many": {name: tensor} | {f"stray.{number}": torch.zeros(1) for number in range(5000)},
        "empty": {name: torch.zeros(0, 1 << 40)},
    }.get(how, {name: tensor})
    return ({} if how == "nothing" else {**rest, **named}), how


def damage_json(rng: Random, path: Path) -> str:
    """Changes a JSON file in place: a value, a name, its depth, or its bytes."""
    text = path.read_text(encoding="utf-8")
    tree = json.loads(text)
    how = rng.choice(["value", "value", "value", "drop", "twice", "deep", "swap", "bytes"])
    place = rng.choice(places(tree)[1:])
    if how == "bytes":
        return damage_bytes(rng, path)
    if how == "value":
        value = rng.choice(WRONG)
        path.write_text(json.dumps(changed(tree, place, value)), encoding="utf-8")
        return f"{'.'.join(map(str, place))}={str(value)[:40]}"
    if how == "deep":
        deep = "[" * 100_000 + "]" * 100_000
        path.write_text(json.dumps(changed(tree, place, "DEEP")).replace('"DEEP"', deep), encoding="utf-8")
    elif how == "swap":
        path.write_text(
            json.dumps(changed(tree, place, _at(tree, rng.choice(places(tree))))), encoding="utf-8"
        )
    elif how == "drop":
        inner = _at(tree, place[:-1])
        del inner[place[-1]]
        path.write_text(json.dumps(tree), encoding="utf-8")
    else:
        key = json.dumps(str(place[-1]))
        path.write_text(text.replace(f"{key}:", f"{key}: 5, {key}:", 1), encoding="utf-8")
    return f"{how} {'.'.join(map(str, place))}"


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


SCALARS = (
    ".inf", "-.inf", ".nan", "1e400", "1" * 5000, "-1", "0", "[]", "{}", "null", "~", "'abc'",
    "!!python/name:os.system",
    "&a [*a, *a]", "2000000000", "0x10", "1_000", "2:5", "no", '"\\0"', "'/dev/zero'", "{a: 1}", "[[1, 2], 3]", "1e-3",
    "0.3", "16", "64", "0.05", "2.0", "1", "1e-5", "0.9", "32", "'0.3'",
)  # fmt: skip


def damage_yaml(rng: Random, path: Path) -> str:
    """Changes a YAML file in place: the value of a line, its depth, an alias bomb, its base, or its bytes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    keyed = [number for number, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    how = rng.choice(["value", "value", "value", "value", "bomb", "deep", "base", "line", "bytes"])
    if how == "bytes":
        return damage_bytes(rng, path)
    number = rng.choice(keyed)
    if how == "value":
        value = rng.choice(SCALARS)
        lines[number] = f"{lines[number].partition(':')[0]}: {value}"
        how = f"value {value[:30]}"
    elif how == "bomb":
        lines += ["a0: &a0 [x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, rng.randint(4, 40))]
    elif how == "deep":
        lines[number] = f"{lines[number].partition(':')[0]}: {'[' * 20_000}{']' * 20_000}"
    elif how == "base":
        base = rng.choice(
            [path.name, "/dev/zero", ".", "..", "nowhere.yaml", "'a\\0b'", "5", "[]", "/proc/self/mem"]
        )
        lines.insert(0, f"base: {base}")
    else:
        lines.insert(rng.randrange(len(lines)), lines[number])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return how
