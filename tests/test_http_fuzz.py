"""Requests made by a machine from the OpenAPI document, right ones and wrong ones.

`ELLM_FUZZ_EXAMPLES` in the environment makes it longer.
"""

import os
import random
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from checked_engine import CheckedEngine
from http_server import MODEL, RunningServer
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

EXAMPLES = int(os.environ.get("ELLM_FUZZ_EXAMPLES", "12"))
SEED = 20261123
BOUNDS = {"max_body_bytes": 32768, "max_files": 20, "max_file_bytes": 65536, "max_prompts": 8}
OPERATIONS = [
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/{id}"),
    ("DELETE", "/v1/files/{id}"),
    ("GET", "/v1/files/{id}/content"),
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/{id}"),
    ("POST", "/v1/batches/{id}/cancel"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    maker = CheckedEngine()
    # A short context: a request without a limit of tokens is no reason to wait.
    with RunningServer(maker(None, max_model_len=96), **BOUNDS) as server:
        yield server
    maker.finish()


def healthy(server: RunningServer) -> None:
    asked = {"model": MODEL, "prompt": "A river", "max_tokens": 2}
    reply = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_made_requests_are_answered_or_refused(server, method, path, mode):
    document = httpx.get(f"{server.url}/openapi.json").json()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("any path is as good as another")

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body and mode.is_positive:
            case.body["model"] = MODEL
        reply = case.call(base_url=server.url, timeout=60)
        assert 200 <= reply.status_code < 500, f"{reply.status_code}: {reply.text}"
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    send()
    healthy(server)


def test_bytes_that_were_changed_at_random(server):
    rng = random.Random(SEED)
    good = httpx.Request(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 3,
            "stop": ["x", "y"],
            "logit_bias": {"5": 1.5},
            "seed": 7,
        },
    )
    body = good.read()
    before = server.settled_bytes()
    with httpx.Client(timeout=60) as client:
        for _ in range(EXAMPLES * 10):
            changed = bytearray(body)
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(changed))
                changed[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            reply = client.post(
                good.url, content=bytes(changed), headers={"content-type": "application/json"}
            )
            assert 200 <= reply.status_code < 500, bytes(changed)
    healthy(server)
    assert server.settled_bytes() == before
