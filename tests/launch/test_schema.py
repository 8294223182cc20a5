"""The JSON schema of recipes: what `load_config` accepts, as editors see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.load_config import dump_config, recipe_names, recipe_text
from graftvit.launch.schema import recipe_schema
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer.config import RunConfig
from jsonschema import Draft202012Validator
from support.runs.typed import Typed

CFGS = Path(__file__).parents[2] / "cfgs"


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    described = recipe_schema()
    Draft202012Validator.check_schema(described)
    return Draft202012Validator(described)


def test_the_file_beside_the_recipes_is_what_the_command_prints(typed: Typed) -> None:
    printed = typed("list", "schema").out
    assert json.loads((CFGS / "schema.json").read_text()) == json.loads(printed), "run `make docs`"


def test_every_recipe_and_every_configuration_of_a_run_fit(schema: Draft202012Validator) -> None:
    texts = {name: recipe_text(name) for name in recipe_names()}
    found = {
        name: [error.message for error in schema.iter_errors(parse_yaml(text))]
        for name, text in {**texts, "a run": dump_config(RunConfig())}.items()
    }
    assert {name: errors for name, errors in found.items() if errors} == {}
    assert all("\n# yaml-language-server: $schema=schema.json\n" in text for text in texts.values())


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("{base: digits_copy, optim.blr: 1e-3, data: {aa: None}}", True),
        ("{transfer: {layers: 7, heads: [0, 1]}, optim: null}", True),
        ("{students: {linear: {student.plan: '*: linear'}}}", True),
        ("{transfer: {losses: [{method: of_a_plugin, layers: [[1, 2]]}]}}", True),
        ("{optim: {blr: '1e-3', epochs: '3', betas: ['0.9', 0.95]}, student.img_size: '64'}", True),
        ("{optim: {epochs: '3.5'}}", False),
        ("{optim: {blrr: 1e-3}}", False),
        ("{optim.epochs: many}", False),
        ("{stages: [{mode: align}]}", False),
        ("{students: {linear: {base: digits_copy}}}", False),
        ("{compare: {}}", False),
    ],
)
def test_what_the_loader_reads_fits_and_a_mistake_does_not(
    text: str, fits: bool, schema: Draft202012Validator
) -> None:
    assert schema.is_valid(parse_yaml(text)) is fits


def test_every_key_has_its_help(schema: Draft202012Validator) -> None:
    described: dict[str, Any] = schema.schema["$defs"]
    for section in ("DataConfig", "TransferConfig", "LossEntry", "CompareConfig"):
        assert "Args" not in described[section]["description"]
        assert all(key["description"] for key in described[section]["properties"].values())
