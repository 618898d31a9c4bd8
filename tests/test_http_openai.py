"""The OpenAI API through OpenAI's own client, against what the engine says when asked directly."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from checked_engine import CheckedEngine
from http_server import MODEL, RunningServer
from openai import AsyncOpenAI, OpenAI
from openai_clients import KINDS, openai_client

from ellm_jax import Engine, RequestOutput, SamplingParams

TEXT = "The history of the town begins with"
CHAT = [{"role": "user", "content": "Where do rivers end?"}]
KEYS = {"red": "red-key-0123456789", "blue": "blue-key-012345678"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    maker = CheckedEngine()
    with RunningServer(maker(None), api_keys=KEYS) as server:
        yield server
    maker.finish()


@pytest.fixture
def engine(server: RunningServer) -> Engine:
    return server.engine


@pytest.fixture(params=KINDS)
def client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    with openai_client(request.param, base_url=f"{server.url}/v1", api_key=KEYS["red"]) as client:
        yield client


def direct(engine: Engine, prompt, **params) -> RequestOutput:
    return engine.generate([prompt], SamplingParams(**params))[0]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt/9")


PARAMS = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.3, "seed": -5, "top_p": 0.5},
    {"temperature": 0.7, "seed": 1, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": {"100": 90, "101": 90}, "presence_penalty": 2},
    {"stop": " the"},
    {"stop": ["zzz", ",", "."]},
    {"n": 3, "temperature": 1, "seed": 3},
    {"max_tokens": 1},
]
EXTRA = [
    {"top_k": 3, "temperature": 1, "seed": 9},
    {"min_p": 0.2, "temperature": 1, "seed": 9},
    {"repetition_penalty": 1.5},
    {"min_tokens": 5, "stop": ["a", "e"]},
    {"ignore_eos": True},
    {"stop": [" the"], "include_stop_str_in_output": True},
]
VLLM_NAMES = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos")
VLLM_NAMES += ("include_stop_str_in_output",)


@pytest.mark.parametrize("params", PARAMS + EXTRA, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_those_of_the_engine(client, engine, params, stream):
    params = {"temperature": 0, "max_tokens": 24} | params
    wanted = direct(engine, TEXT, **params)
    extra = {name: params[name] for name in params if name in VLLM_NAMES}
    known = {name: params[name] for name in params if name not in VLLM_NAMES}
    asked = {"model": MODEL, "prompt": TEXT, "extra_body": extra, "stream": stream}
    reply = client.completions.create(**asked, **known)
    count = params.get("n", 1)
    if stream:
        texts, reasons = [""] * count, [None] * count
        for chunk in reply:
            for choice in chunk.choices:
                assert reasons[choice.index] is None, "something came behind the end"
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason
    else:
        assert [choice.index for choice in reply.choices] == list(range(count))
        texts = [choice.text for choice in reply.choices]
        reasons = [choice.finish_reason for choice in reply.choices]
        generated = sum(len(each.token_ids) for each in wanted.outputs)
        assert reply.usage.prompt_tokens == len(wanted.prompt_token_ids)
        assert reply.usage.completion_tokens == generated
        assert reply.usage.total_tokens == len(wanted.prompt_token_ids) + generated
    assert texts == [each.text for each in wanted.outputs]
    assert reasons == [each.finish_reason for each in wanted.outputs]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_as_texts_and_token_ids(client, engine, stream):
    texts = [TEXT, "Once", "Water is"]
    ids = [engine.tokenizer.encode(text) for text in texts]
    wanted = [direct(engine, t, max_tokens=9, temperature=1, seed=2, n=2) for t in texts]
    expected = [each.text for output in wanted for each in output.outputs]
    for prompt in (texts, ids, [texts[0], *ids[1:]]):
        reply = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=9, temperature=1, seed=2, n=2, stream=stream
        )
        got = [""] * 6
        for chunk in reply if stream else [reply]:
            for choice in chunk.choices:
                got[choice.index] += choice.text
        assert got == expected
    (alone,) = client.completions.create(
        model=MODEL, prompt=ids[0], max_tokens=9, temperature=1, seed=2
    ).choices
    assert alone.text == expected[0]


def test_mixed_prompts_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="mixes") as error:
        client.completions.create(model=MODEL, prompt=[1, "text"])
    assert error.value.param == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_completions(client, engine, stream):
    (wanted,) = direct(engine, TEXT, max_tokens=6, temperature=0, logprobs=3).outputs
    reply = client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=6, temperature=0, logprobs=3, stream=stream
    )
    parts = [c.choices[0].logprobs for c in (reply if stream else [reply])]
    parts = [part for part in parts if part is not None]
    assert [p for part in parts for p in part.token_logprobs] == pytest.approx(
        [entry.logprob for entry in wanted.logprobs]
    )
    tokens = [token for part in parts for token in part.tokens]
    assert "".join(tokens) == wanted.text
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets == [len("".join(tokens[:i])) for i in range(6)]
    tops = [top for part in parts for top in part.top_logprobs]
    for top, entry in zip(tops, wanted.logprobs, strict=True):
        assert list(top.values()) == pytest.approx([value for _, value in entry.top])
        assert list(top) == [engine.tokenizer.decode([token], False) for token, _ in entry.top]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_chats(client, engine, stream):
    (wanted,) = direct(engine, CHAT, max_tokens=6, temperature=0, logprobs=2).outputs
    reply = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    parts = [c.choices[0].logprobs for c in (reply if stream else [reply])]
    entries = [entry for part in parts if part is not None for entry in part.content]
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in wanted.logprobs])
    assert "".join(e.token for e in entries) == wanted.text
    assert b"".join(bytes(e.bytes) for e in entries) == wanted.text.encode()
    for entry, other in zip(entries, wanted.logprobs, strict=True):
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([v for _, v in other.top])


def test_usage_tells_what_was_cached(client, engine, request):
    prompt = engine.tokenizer.encode(f"{request.node.name} has sent nothing here before. " * 20)
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    first, second = (client.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < len(prompt)
    # Another tenant cannot find out that it was asked before.
    other = client.with_options(api_key=KEYS["blue"]).completions.create(**asked)
    assert other.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_counts_tokens_at_its_end_if_asked(client, chat):
    asked = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    create = client.chat.completions.create if chat else client.completions.create
    asked |= {"messages": CHAT} if chat else {"prompt": TEXT}
    whole = create(**asked)
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    bare = list(create(**asked, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in bare)


@pytest.mark.parametrize("stream", [False, True])
def test_chats_are_those_of_the_engine(client, engine, stream):
    messages = [*CHAT, {"role": "assistant", "content": "In the"}, {"role": "user", "content": "?"}]
    wanted = direct(engine, messages, max_tokens=20, temperature=1, seed=4, n=2)
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=20, temperature=1, seed=4, n=2, stream=stream
    )
    if stream:
        texts, roles = ["", ""], [[], []]
        for chunk in reply:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index].append(choice.delta.role)
        for said in roles:
            assert said[0] == "assistant"
            assert not any(said[1:])
    else:
        assert [choice.message.role for choice in reply.choices] == ["assistant"] * 2
        texts = [choice.message.content for choice in reply.choices]
    assert texts == [each.text for each in wanted.outputs]


def test_the_content_of_a_message_may_come_in_parts(client):
    parts = [{"type": "text", "text": "Where do "}, {"type": "text", "text": "rivers end?"}]
    replies = [
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=8,
        )
        for content in (parts, CHAT[0]["content"])
    ]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content


def test_without_a_limit_a_chat_goes_to_the_end_of_the_context(client, engine):
    text = "word " * 700
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == engine.max_model_len


def test_token_ids_come_along_if_asked(client, engine):
    wanted = direct(engine, TEXT, max_tokens=5, temperature=0)
    asked = {"model": MODEL, "prompt": TEXT, "max_tokens": 5, "temperature": 0}
    asked["extra_body"] = {"return_token_ids": True}
    (choice,) = client.completions.create(**asked).choices
    assert tuple(choice.token_ids) == wanted.token_ids
    assert tuple(choice.prompt_token_ids) == wanted.prompt_token_ids
    chunks = client.completions.create(**asked, stream=True)
    assert tuple(t for c in chunks for t in c.choices[0].token_ids) == wanted.token_ids


def test_many_at_once_with_the_asynchronous_client(server, engine):
    prompts = [f"{TEXT} {i}" for i in range(24)]
    params = SamplingParams(max_tokens=16, temperature=0)
    wanted = [output.text for output in engine.generate(prompts, params)]

    async def ask() -> tuple[list[str], list[str]]:
        url = f"{server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=KEYS["blue"], max_retries=0) as client:

            async def whole(prompt: str) -> str:
                reply = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=16, temperature=0
                )
                return reply.choices[0].text

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([c.choices[0].text async for c in stream])

            return (
                await asyncio.gather(*map(whole, prompts)),
                await asyncio.gather(*map(streamed, prompts)),
            )

    assert asyncio.run(ask()) == (wanted, wanted)


BAD = [
    ({"model": "other"}, openai.NotFoundError, "model"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"n": 17}, openai.APIStatusError, "n"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"stop": [""]}, openai.BadRequestError, "stop"),
    ({"stop": ["x"] * 17}, openai.APIStatusError, "stop"),
    ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
    ({"logit_bias": {"word": 1}}, openai.BadRequestError, "logit_bias"),
    ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
    ({"best_of": 3}, openai.BadRequestError, "best_of"),
    ({"echo": True}, openai.BadRequestError, "echo"),
    ({"suffix": "end"}, openai.BadRequestError, "suffix"),
    ({"prompt": []}, openai.BadRequestError, "prompt"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"),
    ({"prompt": [5000]}, openai.BadRequestError, "prompt"),
    ({"prompt": [5] * 1024}, openai.BadRequestError, "prompt"),
    ({"prompt": [5] * 1025}, openai.APIStatusError, "prompt"),
    ({"prompt": ["x"] * 257}, openai.APIStatusError, "prompt"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "tempratur"),
    ({"extra_body": {"min_tokens": 99}}, openai.BadRequestError, "min_tokens"),
]


@pytest.mark.parametrize(("change", "error", "param"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_says_which_field_it_is(client, change, error, param, stream):
    asked = {"model": MODEL, "prompt": TEXT, "stream": stream}
    if stream and "stream_options" in change:
        return
    with pytest.raises(error) as raised:
        client.completions.create(**asked | change)
    assert raised.value.status_code in (400, 404, 413)
    assert raised.value.param == param
    assert raised.value.body["type"] == "invalid_request_error"


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0]",
    ),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"extra_body": {"chat_template_kwargs": {"messages": "x"}}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("change", "param"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_chats_that_are_refused(client, change, param):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT} | change)
    assert raised.value.param == param


def test_a_key_is_needed(server):
    for key in ("wrong", "red-key-012345678"):
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as error,
        ):
            client.models.list()
        assert error.value.code == "invalid_api_key"


def test_there_are_no_embeddings(client):
    with pytest.raises(openai.NotFoundError, match="gives no embeddings"):
        client.embeddings.create(model=MODEL, input="x")


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint())
    assert engine.tokenizer is None
    wanted = direct(engine, [5, 6, 7], max_tokens=6, temperature=0, ignore_eos=True)
    with (
        RunningServer(engine) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
        extra = {"return_token_ids": True, "ignore_eos": True}
        (choice,) = client.completions.create(**asked, extra_body=extra).choices
        assert tuple(choice.token_ids) == wanted.token_ids
        chunks = list(client.completions.create(**asked, stream=True, extra_body=extra))
        assert len(chunks) > 1
        ids = tuple(token for chunk in chunks for token in chunk.choices[0].token_ids)
        assert ids == wanted.token_ids
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(model=MODEL, prompt="text")
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.chat.completions.create(model=MODEL, messages=CHAT)
