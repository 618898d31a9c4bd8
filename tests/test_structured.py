"""Structured output: whatever the model would like to say, the text has the form that was asked."""

import dataclasses
import json
import pickle
import re

import pytest

from ellm_jax import Engine, EngineConfig, SamplingParams, StructuredOutput
from ellm_jax.structured.output import CHOICES_MAX, SCHEMA_DEPTH_MAX, SOURCE_BYTES_MAX

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SEEDS = range(24)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(device_memory="256MiB", max_num_seqs=32, progress=False, warm_up=False)
    with Engine.from_pretrained(None, config) as engine:
        yield engine


def asked(seed: int, form: StructuredOutput | None, **more: object) -> SamplingParams:
    settings = {"temperature": 1.0, "max_tokens": 120, "seed": seed, **more}
    return SamplingParams(**settings, structured=form)  # type: ignore[arg-type]


def completions(engine: Engine, form: StructuredOutput, **more: object):
    params = [asked(seed, form, **more) for seed in SEEDS]
    outputs = [o.outputs[0] for o in engine.generate(["Once upon a time"] * len(params), params)]
    assert {c.finish_reason for c in outputs} <= {"stop", "length"}, [c.error for c in outputs]
    return outputs


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        {"anyOf": [{"const": 'say "ü"'}, {"type": "boolean"}, {"type": "null"}]},
        {
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
            "$ref": "#/$defs/node",
        },
        {"type": "string", "pattern": "^[a-f]{3}-\\d+$", "maxLength": 9},
    ],
)
def test_finished_json_is_valid(engine, schema):
    texts = [
        completion.text
        for completion in completions(engine, StructuredOutput(json_schema=schema))
        if completion.finish_reason == "stop"
    ]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


# What is wrong is said when it is made.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing is given; give one of them"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice are given"),
        ({"json_schema": "{'a'"}, "json_schema is not JSON"),
        ({"json_schema": ""}, "json_schema is empty"),
        ({"json_schema": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"json_schema": {"x": {1, 2}}}, "cannot be written as JSON"),
        ({"json_schema": "[" * 100_000}, "more than 100 objects"),
        ({"json_schema": {"enum": ["x" * SOURCE_BYTES_MAX]}}, "at most 262144 are allowed"),
        ({"regex": "x" * (SOURCE_BYTES_MAX + 1)}, "regex has 262145 bytes"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
        ({"grammar": " "}, "grammar is empty"),
        ({"choice": []}, "choice has no texts"),
        ({"choice": ["a", ""]}, "choice has an empty text"),
        ({"choice": ["a"] * (CHOICES_MAX + 1)}, "choice has 10001 texts"),
    ],
)
def test_refuses_what_has_no_form(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": [1]},
        {"json_schema": True},
        {"regex": b"a"},
        {"grammar": 3},
        {"choice": "ab"},
        {"choice": [1]},
    ],
)
def test_refuses_values_of_the_wrong_kind(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        StructuredOutput(**fields)


def test_refuses_a_schema_that_is_too_deep_or_holds_itself():
    schema: dict = {"type": "integer"}
    for _ in range(SCHEMA_DEPTH_MAX):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="inside each other"):
        StructuredOutput(json_schema=schema)
    itself: dict = {}
    itself["not"] = itself
    with pytest.raises(ValueError, match="inside each other"):
        StructuredOutput(json_schema=itself)
    many: list = []
    many += [many] * 10
    with pytest.raises(ValueError, match="make it smaller"):
        StructuredOutput(json_schema={"enum": many})


def test_is_a_value():
    form = StructuredOutput(json_schema={"type": "integer"})
    assert form == StructuredOutput(json_schema=' {"type" : "integer"}')
    assert form != StructuredOutput(json_schema={"type": "number"})
    assert {form: 1}[pickle.loads(pickle.dumps(form))] == 1
    assert (form.kind, form.json_schema) == ("json_schema", '{"type":"integer"}')
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.regex = "a"  # type: ignore[misc]
    params = SamplingParams.from_dict({"structured": {"choice": ["a", "b"]}})
    assert params.structured == StructuredOutput(choice=("a", "b"))
    assert hash(params) == hash(SamplingParams(structured=StructuredOutput(choice=["a", "b"])))
    with pytest.raises(ValueError, match="unknown form of output 'json'; known: json_schema"):
        SamplingParams.from_dict({"structured": {"json": "{}"}})
    with pytest.raises(TypeError, match="structured is a dict"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]
