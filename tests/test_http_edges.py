"""What no good client sends: the HTTP server says what is wrong, and stays as it was.

`ELLM_DISCONNECTS` in the environment is the number of clients per seed that go at a random time.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from checked_engine import CheckedEngine
from engine_requests import wait_until
from http_server import MODEL, RunningServer, read_reply, request_bytes
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import body, protocol, templates
from ellm_jax.serving.http.guard import LIVENESS_PATH
from ellm_jax.serving.observer import NullObserver
from ellm_jax.serving.settings import ServeConfig

COMPLETIONS = "/v1/completions"
ASKED = {"model": MODEL, "prompt": "A river", "max_tokens": 4, "temperature": 0}
LONG = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True}
KEYS = {"red": "red-key-0123456789", "blue": "blue-key-012345678"}
LARGE = 64 * 2**10
DISCONNECTS = int(os.environ.get("ELLM_DISCONNECTS", "16"))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    maker = CheckedEngine()
    with RunningServer(maker(None), max_body_bytes=LARGE, max_header_bytes=4096) as server:
        yield server
    maker.finish()


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def well_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the server of the module still answers."""
    yield
    if "server" in request.fixturenames:
        server: RunningServer = request.getfixturevalue("server")
        reply = httpx.post(f"{server.url}{COMPLETIONS}", json=ASKED, timeout=60)
        assert reply.status_code == 200, reply.text
        server.wait_idle()


def check_error(reply: httpx.Response, status: int) -> dict[str, object]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert reply.headers["x-request-id"]
    return error


def test_unknown_paths_and_methods(client):
    check_error(client.get("/v1/nothing"), 404)
    check_error(client.post(COMPLETIONS + "/", json=ASKED), 404)
    reply = client.get(COMPLETIONS)
    check_error(reply, 405)
    assert reply.headers["allow"] == "POST"
    reply = client.put("/v1/files")
    check_error(reply, 405)
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert client.head("/v1/models").status_code == 200


def test_a_request_keeps_its_id(client):
    reply = client.get("/health", headers={"x-request-id": "trace.1-a_B"})
    assert reply.headers["x-request-id"] == "trace.1-a_B"
    for bad in ("", "x" * 129, "a b", "<script>"):
        reply = client.get("/health", headers={"x-request-id": bad})
        assert reply.headers["x-request-id"].startswith("req_")


class Ids(NullObserver):
    """Notes what calls are called."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def on_admitted(self, call: Call, prompt_tokens: int) -> None:
        assert call.request_id is not None
        self.ids.append(call.request_id)


def test_calls_are_named_after_their_requests(make_engine):
    seen = Ids()
    with RunningServer(make_engine(None), observers=[seen]) as server:
        for _ in range(2):
            headers = {"x-request-id": "trace-1"}
            httpx.post(f"{server.url}{COMPLETIONS}", json=ASKED, headers=headers)
        several = {**ASKED, "prompt": ["a", "b"]}
        reply = httpx.post(f"{server.url}{COMPLETIONS}", json=several)
    assert all(name.startswith("trace-1-") for name in seen.ids[:2])
    assert set(seen.ids[2:]) == {f"{reply.headers['x-request-id']}-{i}" for i in range(2)}
    assert len(set(seen.ids)) == 4


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b'{"model": "small", "prompt": "\xff"}',
    b'{"model": "small", "prompt": "\\ud800"}',
    b'{"model": "small", "prompt": "a", "seed": 1e999}',
    b'{"model": "small", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "small", "prompt": "a", "temperature": NaN}',
    b'{"model": "small", "prompt": ' + b"[" * 20000,
    b'{"model": "small", "prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
    b'{"model": "small", "prompt": "a", "metadata": ' + b'{"a":' * 9000,
    b'{"model": "small", "prompt": "a"} trailing',
    b'{"model": "small", "prompt": "a", "prompt\\u0000": 1}',
    b'{"model": "small", "prompt": [[[1]]]}',
    b'{"model": "small", "prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
    json.dumps({**ASKED, "response_format": {"type": "yaml"}}).encode(),
]


@pytest.mark.parametrize("bad", BAD_BODIES, ids=lambda value: repr(value[:40]))
def test_bodies_that_are_no_requests(client, bad):
    reply = client.post(COMPLETIONS, content=bad, headers={"content-type": "application/json"})
    check_error(reply, 400)


def test_other_types_of_content(client):
    reply = client.post(COMPLETIONS, data={"prompt": "x"})
    check_error(reply, 415)


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"properties": schema}
    return schema


def test_schemas_have_a_depth(client):
    for depth, text in ((33, "nested deeper"), (300, "nested deeper")):
        function = {"name": "f", "parameters": nested(depth)}
        tools = [{"type": "function", "function": function}]
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": tools}
        error = check_error(client.post("/v1/chat/completions", json=chat), 400)
        assert text in error["message"]


def test_a_body_that_says_it_is_too_large_is_not_read(server):
    with server.connect() as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {10**12}\r\n\r\n"
        connection.sendall(head.encode())
        status, reply = read_reply(connection)
    assert (status, reply["error"]["code"]) == (413, "too_large")


def test_a_body_that_turns_out_too_large(server):
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(LARGE // 4096 + 1):
                connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert read_reply(connection)[0] == 413


def test_bounds_of_prompts(client):
    reply = client.post(COMPLETIONS, json={**ASKED, "prompt": "x" * LARGE})
    check_error(reply, 413)
    reply = client.post(COMPLETIONS, json={**ASKED, "prompt": "word " * 5000})
    assert check_error(reply, 400)["param"] == "prompt"


@pytest.mark.parametrize(
    "lines",
    [
        [b"x: " + b"y" * 8000],
        [b"x%d: y" % i for i in range(200)],
        [b"x" * 8000 + b": y"],
    ],
    ids=["long value", "many", "long name"],
)
def test_heads_that_are_too_large(server, lines):
    with server.connect() as connection:
        connection.sendall(b"\r\n".join([b"GET /health HTTP/1.1", b"host: x", *lines, b"\r\n"]))
        assert read_reply(connection)[0] == 431
        assert connection.recv(1) == b""


def test_a_head_without_an_end(server):
    with server.connect() as connection:
        connection.sendall(b"GET /" + b"x" * 3000)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x" * 1000)
        # Hung up with what was sent unread, which may cost the client the reply.
        with contextlib.suppress(ConnectionError):
            # Too late instead of too large, where this process was held up meanwhile.
            assert read_reply(connection)[0] in (408, 431)


def send_slowly(connection: socket.socket, more: bytes) -> None:
    for _ in range(2000):
        connection.sendall(more)
        time.sleep(0.001)


CHUNKED = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    "transfer-encoding: chunked\r\n\r\n"
).encode()


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (CHUNKED + b"1\r\n{\r\n0\r\nx: ", b"y" * 1000),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 200),
        (CHUNKED + b"1;x=", b"y" * 1000),
        (request_bytes("GET", "/health"), b"\r\n" * 500),
    ],
    ids=["long trailer", "many trailers", "chunk extension", "blank lines"],
)
def test_what_is_no_body_has_an_end(server, begin, more):
    with server.connect() as connection:
        connection.sendall(begin)
        connection.settimeout(20)
        with pytest.raises(ConnectionError):
            send_slowly(connection, more)
    wait_until(lambda: not server._server.server_state.connections, 10)


def test_chunks_with_extensions_and_trailers_are_read(server):
    text = json.dumps(ASKED).encode()
    chunks = b"".join(b"1;name=%s\r\n%c\r\n" % (b"v" * 100, byte) for byte in text)
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(CHUNKED + chunks + b"0\r\nx-sum: 1\r\n\r\n")
            assert read_reply(connection)[0] == 200


def test_what_is_not_http(server):
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"EHLO mail\r\n\r\n", b"GET\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(junk)
            assert read_reply(connection)[0] == 400


def test_slow_heads_and_bodies_are_given_up(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.2)
    whole = request_bytes("POST", COMPLETIONS, json.dumps(ASKED).encode())
    for sent in (b"", whole[:20], whole[:-5]):
        with server.connect() as connection:
            connection.sendall(sent)
            assert read_reply(connection)[0] == 408
            connection.settimeout(30)
            assert connection.recv(1) == b"", "the connection stays"


def test_truncated_requests(server):
    whole = request_bytes("POST", COMPLETIONS, json.dumps(ASKED).encode())
    for length in range(0, len(whole), 7):
        with server.connect() as connection:
            connection.sendall(whole[:length])


def test_requests_in_a_row_on_one_connection(server):
    whole = request_bytes("POST", COMPLETIONS, json.dumps(ASKED).encode())
    bad = request_bytes("POST", COMPLETIONS, b"{")
    with server.connect() as connection:
        for request, wanted in ((whole, 200), (bad, 400), (whole, 200)):
            connection.sendall(request)
            assert read_reply(connection)[0] == wanted


def test_idle_connections_keep_nobody_out(make_engine):
    """A probe of a server that is well has to get through, however many connections do nothing."""
    with RunningServer(make_engine(None), max_connections=3) as server, contextlib.ExitStack() as s:
        connected = server._server.server_state.connections
        alive = s.enter_context(server.connect())
        alive.sendall(request_bytes("GET", "/health"))
        assert read_reply(alive)[0] == 200
        idle = []
        for sent in (b"GET ", b""):
            idle.append(s.enter_context(server.connect()))
            idle[-1].sendall(sent)
            wait_until(lambda: len(connected) == 1 + len(idle))
        alive.sendall(request_bytes("GET", "/health"))
        assert read_reply(alive)[0] == 200
        for gone in idle:
            assert httpx.get(f"{server.url}/health").status_code == 200
            gone.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert gone.recv(1) == b"", "not the longest idle one went"
            wait_until(lambda: len(connected) <= 2)
            s.enter_context(server.connect())
            wait_until(lambda: len(connected) == 3)


def test_too_many_connections(make_engine):
    with RunningServer(make_engine(None), max_connections=3) as server:
        connected = server._server.server_state.connections
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                whole = request_bytes("POST", COMPLETIONS, json.dumps(ASKED).encode())
                stack.enter_context(server.connect()).sendall(whole[:-5])
            wait_until(lambda: len(connected) == 3 and all(each.cycle for each in connected))
            with server.connect() as connection:
                assert read_reply(connection)[0] == 503
        wait_until(lambda: not connected)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_every_route_but_liveness_needs_a_key(make_engine):
    """A new route cannot forget it: whatever the application has is asked."""
    extra = [Route("/extra", lambda request: PlainTextResponse(request.state.tenant.name))]
    with RunningServer(make_engine(None), extra, api_keys=KEYS) as server:
        paths = [route.path.replace("{model:path}", MODEL) for route in server.app.routes]
        assert {"/health", "/ready", "/v1/files", "/extra", "/metrics", "/dashboard"} <= set(paths)
        with httpx.Client(base_url=server.url) as client:
            for path in [*paths, "/nothing"]:
                for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
                    for given in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic x"}):
                        reply = client.request(method, path, headers=given)
                        if path == LIVENESS_PATH:
                            assert reply.status_code in (200, 405)
                        else:
                            error = check_error(reply, 401)
                            assert error["code"] == "invalid_api_key"
            headers = {"authorization": f"Bearer {KEYS['blue']}"}
            assert client.get("/extra", headers=headers).text == "blue"


def test_every_route_is_described(server):
    described = set(httpx.get(f"{server.url}/openapi.json").json()["paths"])
    paths = {route.path for route in server.app.routes} - server.extra_paths
    assert {path.replace(":path", "") for path in paths} == described


def test_a_full_queue_says_when_to_come_back(make_engine):
    engine = make_engine(None, max_num_seqs=1)
    with RunningServer(engine, max_queue=1) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        # Two in the engine, one waits.
        for _ in range(3):
            connection = stack.enter_context(server.connect())
            connection.sendall(request_bytes("POST", COMPLETIONS, json.dumps(LONG).encode()))
        wait_until(lambda: server.call(server.service.stats).queued == 1)
        reply = client.post(COMPLETIONS, json=ASKED)
        assert check_error(reply, 429)["code"] == "rate_limit_exceeded"
        assert int(reply.headers["retry-after"]) >= 1


def test_a_server_that_drains_takes_nothing_new(make_engine):
    with RunningServer(make_engine(None)) as server:
        asyncio.run_coroutine_threadsafe(server.service.drain(0), server.loop).result(30)
        for reply in (
            httpx.get(f"{server.url}/ready"),
            httpx.post(f"{server.url}{COMPLETIONS}", json=ASKED),
            httpx.post(f"{server.url}/v1/batches", json={}),
            httpx.post(f"{server.url}/v1/files", data={"purpose": "batch"}, files={"file": b"x"}),
        ):
            check_error(reply, 503)
            assert int(reply.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stream_that_fails_says_so_and_does_not_end_well(make_engine):
    with RunningServer(make_engine(None)) as server:
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=LONG, timeout=60) as reply:
            events = (line for line in reply.iter_lines() if line)
            next(events)
            error = ServiceError(ErrorKind.UNAVAILABLE, "it is over")
            server.call(lambda: server.service.fail_all(error))
            last = list(events)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "it is over"


def test_a_failed_engine_fails_what_is_open(make_engine):
    engine = make_engine(None)
    with RunningServer(engine) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        engine.close()
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10)
        check_error(httpx.post(f"{server.url}{COMPLETIONS}", json=ASKED), 503)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_disconnects_at_any_time_leave_nothing_behind(server, seed):
    rng = random.Random(seed)
    before = server.settled_bytes()
    for _ in range(DISCONNECTS):
        asked = {
            **LONG,
            "stream": rng.random() < 0.7,
            "n": rng.choice([1, 1, 3]),
            "prompt": "word " * rng.randint(1, 400),
        }
        if rng.random() < 0.3:
            asked["prompt"] = [asked["prompt"], "other"]
        whole = request_bytes("POST", COMPLETIONS, json.dumps(asked).encode())
        connection = server.connect()
        connection.sendall(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        wait_s = rng.choice([0, 0.005, 0.05, 0.2])
        if wait_s:
            connection.settimeout(wait_s)
            with contextlib.suppress(TimeoutError):
                for _ in range(rng.randint(1, 20)):
                    connection.recv(rng.randint(1, 500))
        if rng.random() < 0.3:
            # A reset instead of an orderly end.
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    assert server.settled_bytes() == before, f"seed {seed}"
    wait_until(lambda: server.call(server.service.stats).open_streams == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_at_once(server, stream):
    server.engine.reset_stats()
    whole = request_bytes("POST", COMPLETIONS, json.dumps({**LONG, "stream": stream}).encode())
    with server.connect() as connection:
        connection.sendall(whole)
        wait_until(lambda: server.engine.load().running == 1)
    begin_steps = server.engine.stats().steps
    wait_until(lambda: server.engine.load().running == 0)
    # The end of the connection takes a moment to get here; the steps meanwhile are few.
    assert server.engine.stats().steps - begin_steps < 100


def test_a_reader_that_stalls_is_cut_off():
    """By hand: a network's buffers are larger than what this model writes."""

    async def stall() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        connection = protocol.BoundedProtocol.__new__(protocol.BoundedProtocol)
        connection.bounds = ServeConfig(stall_s=0.05)
        connection.loop = loop
        connection.transport = SimpleNamespace(abort=lambda: seen.append("abort"))
        connection.flow = SimpleNamespace(
            pause_writing=lambda: seen.append("pause"), resume_writing=lambda: seen.append("resume")
        )
        connection._stall = None
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(0.2)
        connection.pause_writing()
        await asyncio.sleep(0.2)
        return seen

    assert asyncio.run(stall()) == ["pause", "resume", "pause", "abort"]


def test_templates_have_a_limit_of_time(server, client, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATE_TIMEOUT_S", 0.2)
    tokenizer = server.engine.tokenizer
    source = (
        "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setitem(tokenizer.chat_templates, "default", source)
    monkeypatch.setattr(tokenizer, "_compiled", {})
    begin_s = time.monotonic()
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    error = check_error(client.post("/v1/chat/completions", json=chat), 400)
    assert "takes longer" in error["message"]
    assert time.monotonic() - begin_s < 30
    monkeypatch.setitem(tokenizer.chat_templates, "default", "{{ messages.__class__.__mro__ }}")
    monkeypatch.setattr(tokenizer, "_compiled", {})
    check_error(client.post("/v1/chat/completions", json=chat), 400)


def test_half_a_surrogate_pair_is_no_text(client):
    function = {"name": "f", "arguments": '{"a": "\\ud800"}'}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ]
    chat = {"model": MODEL, "messages": messages, "max_tokens": 1}
    error = check_error(client.post("/v1/chat/completions", json=chat), 400)
    assert error["param"] == "messages[1]"
    assert "surrogate" in error["message"]
    function["arguments"] = '{"a": "\\ud83d\\ude00"}'
    assert client.post("/v1/chat/completions", json=chat).status_code == 200

    part = "--b\r\ncontent-disposition: form-data; name={}\r\n\r\n{}\r\n"
    form = part.format("purpose", "batch") + part.format('"file"; filename="\\ud800"', "x")
    kind = "multipart/form-data; boundary=b; charset=raw_unicode_escape"
    reply = client.post("/v1/files", content=form + "--b--", headers={"content-type": kind})
    assert check_error(reply, 400)["param"] == "file"


def test_tokenize_and_back(server, client):
    text = "Städte am Fluss"
    reply = client.post("/tokenize", json={"prompt": text}).json()
    assert reply["tokens"] == server.engine.tokenizer.encode(text)
    assert reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == server.engine.max_model_len
    plain = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == server.engine.tokenizer.encode(text, False)
    back = client.post("/detokenize", json={"tokens": plain["tokens"]}).json()
    assert back["prompt"] == server.engine.tokenizer.decode(plain["tokens"])
    check_error(client.post("/detokenize", json={"tokens": [10**6]}), 400)
    check_error(client.post("/tokenize", json={"prompt": "x", "model": "y"}), 404)
