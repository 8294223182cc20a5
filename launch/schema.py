"""Describe the YAML file of a run as a JSON schema, with which an editor completes and checks it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from ..models.errors import JsonDict
from ..transfer.config import RunConfig
from .fields import leaves, sections

if TYPE_CHECKING:
    from pydantic_core.core_schema import FloatSchema, IntSchema, ModelSchema, NullableSchema

NULL: JsonDict = {"type": "null"}
WHOLE: JsonDict = {"type": ["integer", "string"], "pattern": r"^[-+]?[0-9]+$"}
NUMBER: JsonDict = {
    "type": ["number", "string"], "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
}  # fmt: skip
NONE: JsonDict = {"type": "string", "pattern": "^[Nn][Oo][Nn][Ee]$"}


class _Schema(GenerateJsonSchema):
    """pydantic's schema of a section, with null as `load_config` reads it, and without what repeats the keys."""

    def field_title_should_be_set(self, schema: object) -> bool:
        """Return that no key has a title, which would be the key again."""
        return False

    def int_schema(self, schema: IntSchema) -> JsonSchemaValue:
        """Return the schema of a whole number, which may be in quotes."""
        return {**super().int_schema(schema), **WHOLE}

    def float_schema(self, schema: FloatSchema) -> JsonSchemaValue:
        """Return the schema of a number, which may be in quotes."""
        return {**super().float_schema(schema), **NUMBER}

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        """Return the schema of an optional value, which may be written `none`."""
        return {"anyOf": [self.generate_inner(schema["schema"]), NULL, NONE]}

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """Return the schema of a section, whose description leaves the keys to their own."""
        found = super().model_schema(schema)
        return {**found, "description": found["description"].partition("\n\nArgs:")[0]}


def recipe_schema() -> JsonDict:
    """Return the JSON schema (draft 2020-12) of a recipe or YAML file: what `load_config` accepts.

    Settings stand in their section or as dotted keys, in the file, in a stage and in a student.
    """
    from ..transfer.analysis.compare.comparison_cells import CompareConfig
    from ..transfer.bench_run import BenchConfig

    kinds = (RunConfig, CompareConfig, BenchConfig)
    _, whole = models_json_schema([(kind, "validation") for kind in kinds], schema_generator=_Schema)
    defs = whole["$defs"]
    run = defs.pop("RunConfig")["properties"]
    run |= {name: {"anyOf": [_reference(kind.__name__), NULL]} for name, kind in sections().items()}
    for key, leaf in leaves().items():
        if leaf.section:
            run[key] = _reference(sections()[leaf.section].__name__, leaf.name)
    defs["Settings"] = _mapping(run)
    settings = {key: _reference("Settings", key) for key in run}
    name = {"type": "string", "pattern": r"^[\w-]+$", "description": "the name of the stage"}
    stage = {**_mapping({"name": name, **settings}), "required": ["name"]}
    parts = {
        "base": ({"type": "string"}, "recipe or file whose settings this one changes"),
        "stages": ({"type": "array", "minItems": 1, "items": stage}, "runs, each from the student before"),
        "students": (
            {"type": "object", "minProperties": 1, "additionalProperties": _reference("Settings")},
            "students of one teacher side by side: by name, what differs",
        ),
        "compare": (_reference("CompareConfig"), "what `graftvit compare` reads"),
        "attnbench": (_reference("BenchConfig"), "what `graftvit programs bench` reads"),
    }
    own = {key: {"anyOf": [kind, NULL], "description": text} for key, (kind, text) in parts.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of GraftViT",
        **_mapping({**own, **settings}),
        "$defs": defs,
    }


def schema_text() -> str:
    """Return the schema as cfgs/schema.json holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _mapping(properties: JsonDict) -> JsonDict:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _reference(name: str, key: str = "") -> JsonDict:
    return {"$ref": f"#/$defs/{name}" + (f"/properties/{key}" if key else "")}
