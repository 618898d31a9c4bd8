"""Who is kept out before a route sees anything, and that each refusal is told of once."""

import json
import socket
from collections import Counter

import httpx
import pytest
from checked_engine import CheckedEngine
from engine_requests import wait_until
from http_server import MODEL, RunningServer, read_reply, request_bytes
from openai import OpenAI

from ellm_jax.serving.http import templates
from ellm_jax.serving.http.origins import Origins
from ellm_jax.serving.observer import NullObserver
from ellm_jax.serving.settings import ServeConfig

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {"model": MODEL, "prompt": "A river", "max_tokens": 2}
SAID = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
KEYS = {"red": "red-key-0123456789"}
RED = {"authorization": f"Bearer {KEYS['red']}"}


class Refusals(NullObserver):
    """Writes down what was refused, and to whom."""

    def __init__(self):
        self.said = []

    def on_refused(self, error, tenant):
        self.said.append((error.kind.value, tenant.name))


@pytest.fixture(scope="module")
def engine():
    maker = CheckedEngine()
    yield maker(None)
    maker.finish()


@pytest.fixture(scope="module")
def server(engine):
    with RunningServer(engine, max_body_bytes=4096) as server:
        yield server


def post(server, path=COMPLETIONS, asked=ASKED, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}{path}", json=asked, headers=named, timeout=60)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1.elsewhere.example"},
        {"sec_fetch_site": "cross-site"},
        {
            "sec_fetch_site": "cross-site",
            "origin": "http://127.0.0.1",
            "sec_fetch_mode": "navigate",
        },
        {"host": "elsewhere.example"},
        {"host": "elsewhere.example:8000", "origin": "http://elsewhere.example:8000"},
        {"host": "8.8.8.8"},
        {"host": "[2001:db8::1]:8000"},
        {"host": "[broken"},
    ],
    ids=str,
)
def test_pages_from_elsewhere_are_kept_out_where_there_are_no_keys(server, headers):
    reply = post(server, **headers)
    assert reply.status_code == 403, reply.text
    assert "start the server with keys" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:8000"},
        {"host": "[::1]:8000"},
        {"host": "ellm"},
        {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"},
    ],
    ids=str,
)
def test_who_is_here_may_come_in(server, headers):
    assert post(server, **headers).status_code == 200


def test_who_follows_a_link_sees_the_answer(server):
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert httpx.get(f"{server.url}/v1/models", headers=link, timeout=60).status_code == 200


def test_the_official_client_comes_in(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(**ASKED).choices


def test_with_keys_or_something_in_front_any_name_does(engine):
    with RunningServer(engine, api_keys=KEYS) as server:
        reply = post(server, host="here.example", origin="http://elsewhere.example", **RED)
        assert reply.status_code == 200
    front = Origins(ServeConfig(http="127.0.0.1:1", allow_unauthenticated=True))
    front.check({b"host": b"here.example", b"origin": b"https://here.example"})


def test_a_body_needs_a_type(server):
    body = json.dumps(ASKED).encode()
    url = f"{server.url}{COMPLETIONS}"
    reply = httpx.post(url, content=body, timeout=60)
    assert reply.status_code == 415
    assert "send application/json" in reply.json()["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = httpx.post(url, content=body, headers={"content-type": kind}, timeout=60)
        assert reply.status_code == 415
    charset = {"content-type": "application/json; charset=utf-8"}
    assert httpx.post(url, content=body, headers=charset, timeout=60).status_code == 200


def test_bodies_have_a_budget_together(server):
    bodies = server.app.state.bodies
    assert bodies.most_bytes == 64 * 4096
    head, part = request_bytes("POST", COMPLETIONS, b"x" * 4096)[:-4096], b" " * 4000
    slow: list[socket.socket] = []
    try:
        for _ in range(65):
            slow.append(server.connect())
            slow[-1].sendall(head + part)
        wait_until(lambda: bodies.held_bytes == 65 * len(part))
        with server.connect() as late:
            late.sendall(head + b" " * 4096)
            status, said = read_reply(late)
        assert status == 503
        assert "bytes of bodies are being read" in said["error"]["message"]
    finally:
        for each in slow:
            each.close()
    wait_until(lambda: bodies.held_bytes == 0)
    assert post(server).status_code == 200


def test_every_refusal_is_told_once(engine):
    refusals = Refusals()
    with RunningServer(engine, observers=[refusals], api_keys=KEYS, admin_key="a" * 16) as server:
        json_type = {"content-type": "application/json"}
        post(server)
        post(server, **RED, asked={**ASKED, "temperature": -1})
        post(server, **RED, asked={**ASKED, "temperature": -1, "stream": True})
        post(server, CHAT, {**SAID, "n": 99}, **RED)
        post(server, "/dashboard/resize", {"device_memory": "40MiB"}, **RED)
        url = f"{server.url}{COMPLETIONS}"
        httpx.post(url, content=b"{", headers={**RED, **json_type}, timeout=60)
        httpx.get(f"{server.url}/v1/models", timeout=60)
        httpx.get(f"{server.url}/nothing", headers=RED, timeout=60)
        assert post(server, **RED).status_code == 200
    assert Counter(refusals.said) == {
        ("unauthenticated", "anonymous"): 2,
        ("invalid", "red"): 3,
        ("too_large", "red"): 1,
        ("forbidden", "red"): 1,
    }


def test_a_chat_that_cannot_be_taken_is_not_rendered(engine, monkeypatch):
    rendered = []

    def note(*asked):
        rendered.append(asked)
        raise AssertionError("a template ran")

    with RunningServer(engine) as server:
        monkeypatch.setattr(templates, "within", note)
        assert post(server, CHAT, {**SAID, "n": 99}).status_code == 413
        server.call(lambda: setattr(server.service, "_draining", True))
        for stream in (False, True):
            reply = post(server, CHAT, {**SAID, "stream": stream})
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
        assert not rendered
        server.call(lambda: setattr(server.service, "_draining", False))
        monkeypatch.undo()
        assert post(server, CHAT, SAID).status_code == 200
