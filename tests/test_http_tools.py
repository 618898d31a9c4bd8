"""Tools and forms of answers over HTTP: what comes is what was asked for, by the real engine."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs  # comes with schemathesis
import openai
import pytest
from checked_engine import CheckedEngine
from http_server import MODEL, RunningServer
from openai_clients import KINDS, openai_client

from ellm_jax.assembly import TINY_MODEL

CHAT = [{"role": "user", "content": "What is the weather in the city?"}]
# Writes what it is given, so that a test can read in the prompt what the template got.
TEMPLATE = """\
{% if tools %}<tool_call> knows:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
{% endif %}
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}
{% for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments.city }})
{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"$ref": "#/$defs/Unit"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add", "parameters": ADD, "description": "Adds."}},
]
SCHEMAS = {"weather": WEATHER, "add": ADD}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(Path(TINY_MODEL), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    maker = CheckedEngine()
    with RunningServer(maker(path)) as server:
        yield server
    maker.finish()


@pytest.fixture(params=KINDS)
def client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    with openai_client(request.param, base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def calls_of(client: Any, stream: bool, **asked) -> tuple[list[tuple[str, str]], str, str]:
    """Calls, text and finish reason of an answer."""
    asked = {"model": MODEL, "messages": CHAT, "tools": TOOLS, "seed": 3, **asked}
    reply = client.chat.completions.create(stream=stream, **asked)
    if not stream:
        (choice,) = reply.choices
        calls = choice.message.tool_calls or []
        assert all(call.id.startswith("call_") for call in calls)
        found = [(call.function.name, call.function.arguments) for call in calls]
        return found, choice.message.content or "", choice.finish_reason
    parts: dict[int, list[str]] = {}
    text, reason = "", None
    for chunk in reply:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            part = parts.setdefault(call.index, ["", ""])
            part[0] += call.function.name or ""
            part[1] += call.function.arguments or ""
    assert list(parts) == list(range(len(parts)))
    return [(name, arguments) for name, arguments in parts.values()], text, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_is_made(client, stream):
    calls, text, reason = calls_of(
        client, stream, tool_choice="required", parallel_tool_calls=False, max_tokens=500
    )
    ((name, arguments),) = calls
    jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
    assert (text, reason) == ("", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["weather", "add"])
def test_the_call_that_is_named_is_made(client, name, stream):
    choice = {"type": "function", "function": {"name": name}}
    calls, text, reason = calls_of(client, stream, tool_choice=choice, max_tokens=200)
    ((called, arguments),) = calls
    assert called == name
    jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
    assert (text, reason) == ("", "tool_calls")


def test_a_forced_call_that_is_cut_off_says_so(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    calls, _, reason = calls_of(client, False, tool_choice=choice, max_tokens=2)
    assert reason == "length"
    assert len(calls) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_the_format_of_the_template_is_a_call(client, stream):
    """The small model knows no tools: a grammar has it write what one that does would."""
    regex = r'Well\. <tool_call>\{"name": "add", "arguments": \{"a": [1-9][0-9]?\}\}</tool_call>'
    calls, text, reason = calls_of(
        client, stream, extra_body={"structured": {"regex": regex}}, max_tokens=100
    )
    ((name, arguments),) = calls
    assert name == "add"
    jsonschema_rs.validate(ADD, json.loads(arguments))
    assert (text, reason) == ("Well.", "tool_calls")


def prompt_of(server: RunningServer, client: Any, **asked) -> str:
    reply = client.chat.completions.create(
        model=MODEL, max_tokens=1, extra_body={"return_token_ids": True}, **asked
    )
    return server.engine.tokenizer.decode(reply.prompt_token_ids, skip_special_tokens=False)


def test_the_template_is_given_tools_and_earlier_calls(server, client):
    past = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    prompt = prompt_of(server, client, messages=past, tools=TOOLS)
    assert '"name": "add"' in prompt
    assert "weather(Bonn)" in prompt
    assert "<|tool|>sunny" in prompt
    assert "knows" not in prompt_of(server, client, messages=past, tools=TOOLS, tool_choice="none")
    past[1]["tool_calls"][0]["function"]["arguments"] = "[1]"
    with pytest.raises(openai.BadRequestError, match="no JSON object"):
        prompt_of(server, client, messages=past)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS * 100}, "tools"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choices_that_make_no_sense(client, change, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            **{"model": MODEL, "messages": CHAT, "tools": TOOLS, "max_tokens": 1} | change
        )
    assert error.value.param.replace("[...]", "[0]") == param


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_json_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "response_format": form}
    for seed in range(3):
        reply = client.chat.completions.create(**asked, seed=seed, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            assert reply.choices[0].finish_reason == "stop"
            text = reply.choices[0].message.content
        jsonschema_rs.validate(WEATHER, json.loads(text))


def test_answers_are_json_objects(client):
    reply = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        seed=1,
        max_tokens=300,
        temperature=1.5,
        response_format={"type": "json_object"},
    )
    text = reply.choices[0].message.content
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    assert text.startswith("{")


FORMS = [
    ({"regex": "[0-9]{3}-[a-f]+x"}, lambda text: re.fullmatch("[0-9]{3}-[a-f]+x", text)),
    ({"choice": ["yes", "no", "perhaps"]}, lambda text: text in ("yes", "no", "perhaps")),
    ({"grammar": 'start: "a" "b"+ "c"'}, lambda text: re.fullmatch("ab+c", text)),
    ({"json_schema": {"type": "integer"}}, lambda text: isinstance(json.loads(text), int)),
]


@pytest.mark.parametrize(
    ("form", "right"), FORMS, ids=["regex", "choice", "grammar", "json_schema"]
)
def test_completions_take_forms_too(client, form, right):
    for seed in range(3):
        (choice,) = client.completions.create(
            model=MODEL, prompt="x", max_tokens=60, seed=seed, extra_body={"structured": form}
        ).choices
        assert choice.finish_reason == "length" or right(choice.text), choice.text


@pytest.mark.parametrize(
    "asked",
    [
        {"structured": {}},
        {"structured": {"regex": "["}},
        {"structured": {"grammar": "start: nothing"}},
        {"structured": {"regex": "a", "choice": ["b"]}},
        {"structured": {"choice": [""]}},
        {"structured": {"json_schema": {"type": "unheard"}}},
        {"structured": {"json_schema": {"$ref": "#/nowhere"}}},
        {"structured": {"json_schema": {"$ref": "http://example.com/schema"}}},
        {"structured": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x" * 100}}},
        {"structured": {"regex": "a" * 70_000}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_forms_that_cannot_be(client, asked):
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model=MODEL, prompt="x", extra_body=asked)
    assert error.value.status_code in (400, 413)
    assert error.value.param.split(".")[0] in ("structured", "response_format")
