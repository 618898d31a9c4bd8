"""The batch file's lines, and `ellm batch` with an engine that is only pretended."""

import io
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from ellm_jax import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams, TokenLogprobs
from ellm_jax.batch_file import (
    CHAT_URL,
    COMPLETIONS_URL,
    BadLine,
    BatchRequest,
    failure_line,
    line_id_of,
    line_key,
    parse_line,
    success_line,
)
from ellm_jax.cli import batch
from ellm_jax.cli.console import Failure


def _line(body: Any, url: str = COMPLETIONS_URL, custom_id: Any = "a", **more: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}
    return json.dumps(fields).encode()


def test_a_completion_is_read_with_all_its_fields() -> None:
    body = {
        "model": "m",
        "prompt": "hello",
        "n": 2,
        "stop": ["x", "y"],
        "seed": 5,
        "logprobs": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100},
        "max_tokens": 9,
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 4,
        "user": "u",
        "stream": False,
        "echo": None,
    }
    assert parse_line(_line(body), {}) == BatchRequest(
        "a",
        COMPLETIONS_URL,
        "hello",
        SamplingParams(
            n=2,
            stop=["x", "y"],
            seed=5,
            logprobs=3,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={7: -100},
            max_tokens=9,
            temperature=0.3,
            top_p=0.9,
            top_k=4,
        ),
    )


def test_a_chat_is_read_and_its_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        "logprobs": True,
        "top_logprobs": 2,
        "max_completion_tokens": 3,
    }
    request = parse_line(_line(body, CHAT_URL), {"temperature": 0.0, "max_tokens": 99})
    assert request.prompt == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one two"},
    ]
    assert request.params == SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)


@pytest.mark.parametrize(
    ("prompt", "read"), [([1, 2], [1, 2]), (["x"], "x"), ([[4, 5]], [4, 5]), ("x", "x")]
)
def test_prompts_come_as_text_or_token_ids(prompt: Any, read: Any) -> None:
    assert parse_line(_line({"prompt": prompt}), {}).prompt == read


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse_line(b"\xef\xbb\xbf" + _line({"prompt": "x"}), {}).prompt == "x"


_USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{nope", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (_line({"prompt": "x"}, custom_id=None), "custom_id"),
        (_line({"prompt": "x"}, custom_id=""), "custom_id"),
        (_line({"prompt": "x"}, method="GET"), "POST"),
        (_line({"prompt": "x"}, "/v1/embeddings"), "/v1/embeddings"),
        (_line(None), "body"),
        (_line({}), "prompt is missing"),
        (_line({"prompt": ["x", "y"]}), "2 prompts"),
        (_line({"prompt": [1, True]}), "prompt is missing or neither"),
        (_line({"prompt": {"text": "x"}}), "prompt is missing or neither"),
        (_line({"prompt": "x", "tempreature": 1}), "'tempreature'"),
        (_line({"prompt": "x", "temperature": -1}), "temperature=-1"),
        (_line({"prompt": "x", "temperature": "warm"}), "temperature='warm'"),
        (_line({"prompt": "x", "max_tokens": 1.5}), "max_tokens=1.5"),
        (_line({"prompt": "x", "stream": True}), "stream=True"),
        (_line({"prompt": "x", "echo": True}), "echo=True"),
        (_line({"prompt": "x", "best_of": 2}), "best_of=2"),
        (_line({"prompt": "x", "top_logprobs": 2}), "top_logprobs"),
        (_line({"prompt": "x", "logprobs": True}), "logprobs=True"),
        (_line({"messages": _USER}), "prompt is missing"),
        (_line({"prompt": "x"}, CHAT_URL), "messages is missing"),
        (_line({"messages": []}, CHAT_URL), "messages is missing"),
        (_line({"messages": ["x"]}, CHAT_URL), "messages[0]"),
        (_line({"messages": [{"role": "user"}]}, CHAT_URL), "messages[0]"),
        (_line({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, CHAT_URL), ""),
        (_line({"messages": _USER, "logprobs": 3}, CHAT_URL), "logprobs=3"),
        (_line({"messages": _USER, "top_logprobs": 3}, CHAT_URL), "needs logprobs"),
        (_line({"messages": _USER, "max_tokens": 2, "max_completion_tokens": 3}, CHAT_URL), "diff"),
        (_line({"messages": _USER, "tools": [{"type": "function"}]}, CHAT_URL), "tools="),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: bytes, said: str) -> None:
    with pytest.raises(BadLine) as caught:
        parse_line(line, {})
    assert said in str(caught.value)


class _Words:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(f"<{token}>" for token in ids)


def _output(logprobs: bool = False) -> RequestOutput:
    entries = (
        TokenLogprobs(7, -0.5, 1, ((7, -0.5), (8, -1.5))),
        TokenLogprobs(9, -2.0, 3, ((8, -0.25), (7, -1.0))),
    )
    completion = CompletionOutput(
        0, "<7><9>", (7, 9), "stop", logprobs=entries if logprobs else None
    )
    return RequestOutput("r", "p", (1, 2, 3), (completion,), True, RequestMetrics(0.0))


def _success(url: str, logprobs: bool = False) -> dict[str, Any]:
    request = BatchRequest("a", url, "p", SamplingParams())
    line = success_line(
        request, _output(logprobs), line_id="b", model="m", created=5, decoder=_Words()
    )
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_a_completion_is_written_as_openai_does() -> None:
    line = _success(COMPLETIONS_URL)
    body = line["response"].pop("body")
    assert line["response"].pop("request_id")
    assert line == {"id": "b", "custom_id": "a", "response": {"status_code": 200}, "error": None}
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": 0, "text": "<7><9>", "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_a_chat_is_written_as_openai_does() -> None:
    body = _success(CHAT_URL)["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "<7><9>"}
    assert "text" not in body["choices"][0]


def test_log_probabilities_have_the_form_of_each_api() -> None:
    chat = _success(CHAT_URL, logprobs=True)["response"]["body"]["choices"][0]["logprobs"]
    second = chat["content"][1]
    assert (second["token"], second["logprob"], bytes(second["bytes"])) == ("<9>", -2.0, b"<9>")
    assert [(t["token"], t["logprob"]) for t in second["top_logprobs"]] == [
        ("<8>", -0.25),
        ("<7>", -1.0),
    ]
    assert _success(COMPLETIONS_URL, True)["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["<7>", "<9>"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"<7>": -0.5, "<8>": -1.5}, {"<8>": -0.25, "<7>": -1.0}],
        "text_offset": [0, 3],
    }


def test_a_failure_is_written_and_read_back_by_its_key() -> None:
    line = json.loads(failure_line("a", "why", line_id="b"))
    assert line["response"]["status_code"] == 400
    assert line["response"]["body"]["error"]["message"] == "why"
    assert line_key(json.dumps(line)) == "a"
    assert line_key(failure_line(None, "why", line_id="b")) == "b"
    half = failure_line("\ud800", "why", line_id="b")
    half.encode()
    assert line_key(half) == "\ud800"


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"id": "x", "custom_id": "y"}', "7"])
def test_what_is_no_output_line_is_told(line: str) -> None:
    with pytest.raises(BadLine):
        line_key(line)


class _Engine:
    """Answers from a thread, a little later, and remembers how many requests it held at once."""

    tokenizer = None

    def __init__(self) -> None:
        self.now = self.most = 0
        self.seen: list[Any] = []
        self._lock = threading.Lock()

    def submit(self, prompt: Any, params: SamplingParams) -> Future[RequestOutput]:
        if prompt == "bad":
            raise ValueError("refused")
        future: Future[RequestOutput] = Future()
        with self._lock:
            self.seen.append(prompt)
            self.now += 1
            self.most = max(self.most, self.now)

        def answer() -> None:
            with self._lock:
                self.now -= 1
            future.set_result(_output())

        threading.Timer(0.002, answer).start()
        return future


def _job(engine: _Engine, out: io.BytesIO, done: set[str]) -> batch._Job:
    return batch._Job(engine, out, done, {}, "m", tqdm(disable=True))  # type: ignore[arg-type]


def test_requests_in_the_engine_are_bounded_and_all_are_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"\n".join(_line({"prompt": f"p{i}"}, custom_id=f"{i}") for i in range(50)))
    engine, out = _Engine(), io.BytesIO()
    job = _job(engine, out, {"3"})
    job.run(source, 4)
    assert engine.most <= 4
    keys = [line_key(line.decode()) for line in out.getvalue().splitlines()]
    assert sorted(keys, key=int) == [str(i) for i in range(50) if i != 3]
    assert job.summary() == {
        "completed": 49,
        "failed": 0,
        "skipped": 1,
        "duplicates": 0,
        "output_tokens": 98,
    }


def test_bad_lines_and_duplicates_do_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    lines = [
        _line({"prompt": "x"}, custom_id="a"),
        b"{nope",
        b"",
        _line({"prompt": "y"}, custom_id="a"),
        _line({"prompt": "bad"}, custom_id="b"),
        _line({"prompt": "z"}, custom_id="c"),
    ]
    source.write_bytes(b"\n".join(lines))
    engine, out = _Engine(), io.BytesIO()
    job = _job(engine, out, set())
    job.run(source, 4)
    results = {line_key(line.decode()): json.loads(line) for line in out.getvalue().splitlines()}
    status = {key: line["response"]["status_code"] for key, line in results.items()}
    assert status == {"a": 200, line_id_of(2): 400, "b": 400, "c": 200}
    assert engine.seen == ["x", "z"]
    assert job.duplicates == 1
    assert "line 4" in capsys.readouterr().err


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    whole = failure_line("a", "why", line_id=line_id_of(1)) + "\n"
    half = failure_line("b", "why", line_id=line_id_of(2))
    target = tmp_path / "out"
    for length in range(len(half) + 1):
        target.write_text(whole + half[:length])
        assert batch._repair(target) == {"a"}
        assert target.read_text() == whole


@pytest.mark.parametrize("content", ["my diary", "my diary\n", '{"id": 1}\n{"id": "batch_req_1'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    target.write_text(content)
    with pytest.raises(Failure, match="line 1"):
        batch._repair(target)
    assert target.read_text() == content


def test_a_number_that_no_float_holds_is_an_error_of_its_line(tmp_path: Path) -> None:
    source = tmp_path / "in"
    lines = [
        _line({"prompt": "x", "temperature": 10**400}, custom_id="a"),
        _line({"prompt": "y"}, custom_id="b"),
    ]
    source.write_bytes(b"\n".join(lines))
    engine, out = _Engine(), io.BytesIO()
    _job(engine, out, set()).run(source, 4)
    results = [json.loads(line) for line in out.getvalue().splitlines()]
    status = {line["custom_id"]: line["response"]["status_code"] for line in results}
    assert status == {"a": 400, "b": 200}
    assert "temperature=" in results[0]["response"]["body"]["error"]["message"]


def test_whatever_a_line_raises_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fragile(_Engine):
        def submit(self, prompt: Any, params: SamplingParams) -> Future[RequestOutput]:
            if prompt == "odd":
                raise OverflowError("too odd")
            return super().submit(prompt, params)

    from_dict = SamplingParams.from_dict

    def broken(values: dict[str, Any]) -> SamplingParams:
        if values.get("seed") == 13:
            raise OverflowError("unlucky")
        return from_dict(values)

    monkeypatch.setattr(SamplingParams, "from_dict", broken)
    source = tmp_path / "in"
    bodies = [{"prompt": "odd"}, {"prompt": "x", "seed": 13}, {"prompt": "x"}]
    lines = [_line(body, custom_id=f"{i}") for i, body in enumerate(bodies)]
    source.write_bytes(b"\n".join(lines))
    out = io.BytesIO()
    _job(Fragile(), out, set()).run(source, 4)
    results = [json.loads(line) for line in out.getvalue().splitlines()]
    status = {line["custom_id"]: line["response"]["status_code"] for line in results}
    assert status == {"0": 400, "1": 400, "2": 200}


def test_the_output_belongs_to_one_process(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        batch._appending(target),
        pytest.raises(Failure, match="written by another process"),
        batch._appending(target),
    ):
        pass
    with batch._appending(target) as out:
        out.write(b"x")
    assert target.read_bytes() == b"x"
