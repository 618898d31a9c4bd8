"""Calls of tools in what models write, however it is cut into pieces."""

import json
import random

import pytest

from ellm_jax.serving.http.tool_calls import (
    ArgumentsReader,
    Call,
    CallReader,
    HermesReader,
    ListReader,
    LlamaReader,
)

NAMES = ("weather", "add")
WEATHER = '{"name": "weather", "arguments": {"city": "Köln \\"}{\\" </x>", "days": [1, 2]}}'
ADD = '{"name": "add", "parameters": {"a": 1, "b": {"c": 2}}}'
SAID = [
    ("weather", {"city": 'Köln "}{" </x>', "days": [1, 2]}),
    ("add", {"a": 1, "b": {"c": 2}}),
]


def read(reader: CallReader, text: str, seed: int) -> tuple[str, list[tuple[str, object]]]:
    """What a reader makes of a text that comes in random pieces."""
    rng = random.Random(seed)
    parts: list[str | Call] = []
    while text:
        cut = rng.randint(1, 7)
        parts += reader.feed(text[:cut])
        text = text[cut:]
    parts += reader.finish()
    calls = [part for part in parts if isinstance(part, Call)]
    assert len({call.id for call in calls}) == len(calls)
    said = "".join(part for part in parts if isinstance(part, str))
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("seed", range(10))
def test_hermes_calls_stand_between_tags_with_text_around(seed):
    text = f"I look.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{ADD}</tool_call>"
    assert read(HermesReader(NAMES), text, seed) == ("I look.", SAID)


@pytest.mark.parametrize("seed", range(10))
def test_the_end_of_the_answer_closes_a_hermes_call(seed):
    assert read(HermesReader(NAMES), f"<tool_call>{ADD}", seed) == ("", SAID[1:])


@pytest.mark.parametrize(
    "text",
    [
        "no call < here <tool_ca",
        "  leading and trailing  \n",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "<tool_call>not JSON</tool_call> and on",
        '<tool_call>{"name": "add"',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_no_hermes_call_is_text(text, seed):
    assert read(HermesReader(NAMES), text, seed) == (text, [])


@pytest.mark.parametrize("start", ["", "<|python_tag|>", "\n "])
@pytest.mark.parametrize("seed", range(5))
def test_llama_answers_are_calls_if_they_begin_like_one(start, seed):
    assert read(LlamaReader(NAMES), f"{start}{WEATHER}; {ADD}\n", seed) == ("", SAID)


@pytest.mark.parametrize(
    "text", ["hello {world}", '{"an": "object"}', '{"name": "add", "parameters": ', " ", "<|pyth"]
)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_no_llama_call_is_text(text, seed):
    said, calls = read(LlamaReader(NAMES), text, seed)
    assert said.strip() == text.strip()
    assert not calls


@pytest.mark.parametrize("seed", range(5))
def test_a_forced_list_is_read_call_by_call(seed):
    assert read(ListReader(NAMES), f"[{WEATHER},\n{ADD}]", seed) == ("", SAID)
    assert read(ListReader(NAMES), f'[{WEATHER}, {{"name": "ad', seed) == ("", SAID[:1])


def test_a_call_comes_as_soon_as_it_is_whole():
    reader = ListReader(NAMES)
    assert not reader.feed(f"[{WEATHER[:-1]}")
    assert [part.name for part in reader.feed("}") if isinstance(part, Call)] == ["weather"]


def test_forced_arguments_are_the_whole_answer():
    said, calls = read(ArgumentsReader("add"), '{"a": 1}', 0)
    assert (said, calls) == ("", [("add", {"a": 1})])


def test_reading_takes_time_in_proportion_to_the_text():
    """Each character is looked at once: of a text ten times as long, ten times as many."""
    reader = LlamaReader(NAMES)
    reader.feed('{"name": "add", "parameters": {"a": "')
    objects = reader._objects
    for _ in range(1000):
        before = objects._at
        reader.feed("{}\\\\" * 10)
        assert objects._at == before + 40
