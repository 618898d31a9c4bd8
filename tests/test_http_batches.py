"""Files and batches over HTTP, with OpenAI's client."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from checked_engine import CheckedEngine
from engine_requests import wait_until
from http_server import MODEL, RunningServer, request_bytes
from openai_clients import KINDS, openai_client

from ellm_jax import SamplingParams

KEYS = {"red": "red-key-0123456789", "blue": "blue-key-012345678"}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
WAIT_S = 120.0


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    maker = CheckedEngine()
    bounds = {"max_file_bytes": 2**20, "max_files": 200}
    with RunningServer(maker(None), api_keys=KEYS, **bounds) as server:
        yield server
    maker.finish()


def client_of(server: RunningServer, tenant: str = "red", kind: str = "sync") -> Any:
    return openai_client(kind, base_url=f"{server.url}/v1", api_key=KEYS[tenant])


@pytest.fixture(params=KINDS)
def client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    with client_of(server, kind=request.param) as client:
        yield client


def line(custom_id: str, body: dict[str, Any], url: str = COMPLETIONS) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 6, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def upload(client: Any, lines: list[Any], name: str = "in.jsonl") -> str:
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    return client.files.create(file=(name, text.encode()), purpose="batch").id


def run(client: Any, lines: list[Any], endpoint: str = COMPLETIONS) -> Any:
    batch = client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h"
    )
    return ended(client, batch.id)


def ended(client: Any, batch_id: str) -> Any:
    end = time.monotonic() + WAIT_S
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled"):
            return batch
        assert time.monotonic() < end, f"the batch is {batch.status}"
        time.sleep(0.05)


def results(client: Any, file_id: str) -> dict[str, Any]:
    lines = client.files.content(file_id).text.splitlines()
    found = {(result := json.loads(text))["custom_id"]: result["response"] for text in lines}
    assert len(found) == len(lines)
    return found


def test_a_batch_gives_what_the_engine_gives(server, client):
    prompts = [f"Chapter {i}" for i in range(40)]
    batch = run(client, [line(f"id-{i}", {"prompt": p}) for i, p in enumerate(prompts)])
    assert batch.status == "completed"
    assert batch.error_file_id is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (40, 40, 0)
    params = SamplingParams(max_tokens=6, temperature=0)
    wanted = {
        f"id-{i}": output.text for i, output in enumerate(server.engine.generate(prompts, params))
    }
    found = results(client, batch.output_file_id)
    assert {name: r["body"]["choices"][0]["text"] for name, r in found.items()} == wanted
    assert all(response["status_code"] == 200 for response in found.values())


def test_a_batch_of_chats_in_which_some_fail(client):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    lines = [
        line("good", chat, CHATS),
        line("no messages", {}, CHATS),
        line("other model", {**chat, "model": "other"}, CHATS),
        line("hot", {**chat, "temperature": 500}, CHATS),
        line("stream", {**chat, "stream": True}, CHATS),
    ]
    batch = run(client, lines, CHATS)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    (good,) = results(client, batch.output_file_id).values()
    assert good["body"]["object"] == "chat.completion"
    failed = results(client, batch.error_file_id)
    statuses = {name: response["status_code"] for name, response in failed.items()}
    assert statuses == {"no messages": 400, "other model": 404, "hot": 400, "stream": 400}
    assert failed["hot"]["body"]["error"]["param"] == "temperature"


def test_a_file_that_is_no_batch_fails_as_a_whole(client):
    batch = run(
        client,
        [
            line("a", {"prompt": "x"}),
            "{",
            "",
            line("a", {"prompt": "x"}),
            line("b", {}, CHATS),
            '{"custom_id": "c", "url": "/v1/completions", "body": {}, "more": 1}',
            "[" * 5000,
        ],
    )
    assert batch.status == "failed"
    codes = {error.line: error.code for error in batch.errors.data}
    assert codes == {
        2: "invalid_json_line",
        4: "duplicate_custom_id",
        5: "mismatched_endpoint",
        6: "invalid_json_line",
        7: "invalid_json_line",
    }
    assert batch.output_file_id is None
    assert run(client, [""]).errors.data[0].code == "empty_file"


def test_a_batch_that_is_cancelled_keeps_what_it_has(server, client):
    lines = [
        line(f"{i}", {"prompt": "x", "max_tokens": 200, "ignore_eos": True}) for i in range(64)
    ]
    before = server.settled_bytes()
    batch = client.batches.create(
        input_file_id=upload(client, lines), endpoint=COMPLETIONS, completion_window="24h"
    )
    while client.batches.retrieve(batch.id).status == "validating":
        time.sleep(0.01)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    done = 0 if batch.output_file_id is None else len(results(client, batch.output_file_id))
    assert done == batch.request_counts.completed < 64
    assert server.settled_bytes() == before
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.batches.cancel(batch.id)


def test_a_batch_goes_on_after_a_restart(make_engine, tmp_path: Path):
    engine = make_engine(None)
    lines = [line(f"{i}", {"prompt": f"Part {i}", "max_tokens": 40}) for i in range(60)]
    settings = {"api_keys": KEYS, "files_dir": str(tmp_path / "files")}
    with RunningServer(engine, **settings) as server, client_of(server) as client:
        batch = client.batches.create(
            input_file_id=upload(client, lines), endpoint=COMPLETIONS, completion_window="24h"
        )
        counts = batch.request_counts
        while counts.completed < 3:
            time.sleep(0.01)
            counts = client.batches.retrieve(batch.id).request_counts
    assert counts.completed < 60
    # As if the machine had gone down in the middle of a line.
    (output,) = (
        p for p in (tmp_path / "files").glob("*.data") if p.read_bytes()[:12] == b'{"id":"batch'
    )
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_')
    with RunningServer(engine, **settings) as server, client_of(server) as client:
        batch = ended(client, batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
        assert set(results(client, batch.output_file_id)) == {f"{i}" for i in range(60)}


def test_files_are_listed_in_pages_read_and_deleted(server):
    with client_of(server, "blue") as client:
        ids = [upload(client, ["x" * i]) for i in range(5)]
        assert {file.id for file in client.files.list(limit=2)} == set(ids)
        page = client.files.list(limit=2, order="asc")
        assert (len(page.data), page.has_more) == (2, True)
        assert client.files.retrieve(ids[3]).bytes == 3
        assert client.files.content(ids[3]).read() == b"xxx"
        assert client.files.delete(ids[3]).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(ids[3])
        assert client.files.list(purpose="batch_output").data == []
        for query in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "file-1"}):
            with pytest.raises(openai.BadRequestError):
                client.files.list(extra_query=query)


def test_tenants_do_not_see_each_others_files(server, client):
    file_id = upload(client, [line("a", {"prompt": "x"})])
    batch = run(client, [line("a", {"prompt": "x"})])
    with client_of(server, "blue") as other:
        for ask in (
            lambda: other.files.retrieve(file_id),
            lambda: other.files.content(file_id),
            lambda: other.files.delete(file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
            lambda: other.batches.create(
                input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert batch.id not in {each.id for each in other.batches.list()}
    assert batch.id in {each.id for each in client.batches.list()}
    assert client.files.retrieve(file_id).id == file_id


@pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "file-1", "%00", "file-" + "g" * 32])
def test_odd_ids_are_no_files(server, path):
    headers = {"authorization": f"Bearer {KEYS['red']}"}
    for tail in ("", "/content"):
        reply = httpx.get(f"{server.url}/v1/files/{path}{tail}", headers=headers)
        assert reply.status_code == 404
        assert reply.json()["error"]["message"]


def test_bounds_and_forms_of_uploads(server, client):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("big", b"x" * (2**20 + 1)), purpose="batch")
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    url = f"{server.url}/v1/files"
    headers = {"authorization": f"Bearer {KEYS['red']}"}
    form = {"content-type": "multipart/form-data; boundary=b", **headers}
    bodies = [
        b"",
        b"--b",
        b"--b\r\n\r\nx",
        b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--",
    ]
    for content in bodies:
        reply = httpx.post(url, content=content, headers=form)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"]
    assert httpx.post(url, json={}, headers=headers).status_code == 415
    bare = {**headers, "content-type": "multipart/form-data"}
    assert httpx.post(url, content=b"x", headers=bare).status_code == 400
    fields = {"purpose": "batch", "file": "no file"}
    reply = httpx.post(url, data=fields, files={"other": b""}, headers=headers)
    assert reply.status_code == 400
    many = [("file", (f"{i}", b"x")) for i in range(3)]
    reply = httpx.post(url, data={"purpose": "batch"}, files=many, headers=headers)
    assert reply.status_code == 400


def test_a_tenant_may_have_so_many_files(make_engine):
    with RunningServer(make_engine(None), max_files=3, api_keys=KEYS) as server:
        with client_of(server) as client:
            for _ in range(3):
                upload(client, ["x"])
            with pytest.raises(openai.APIStatusError, match="delete some"):
                upload(client, ["x"])
        with client_of(server, "blue") as other:
            upload(other, ["x"])


def test_a_batch_takes_more_than_a_few_seats(make_engine):
    with RunningServer(make_engine(None, max_num_seqs=48)) as server:
        lines = [line(f"{i}", {"prompt": "x", "max_tokens": 300}) for i in range(48)]
        with openai_client("sync", base_url=f"{server.url}/v1", api_key="none") as client:
            file_id = upload(client, lines)
            batch = client.batches.create(
                input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h"
            )

            def seats() -> int:
                load = server.engine.load()
                return int(load.running + load.waiting)

            wait_until(lambda: seats() > 24, 30)
            client.batches.cancel(batch.id)
            ended(client, batch.id)


def test_a_batch_whose_engine_fails_goes_on_with_the_next(make_engine, tmp_path: Path):
    lines = [line(f"{i}", {"prompt": f"Part {i}", "max_tokens": 40}) for i in range(60)]
    settings = {"api_keys": KEYS, "files_dir": str(tmp_path / "files")}
    engine = make_engine(None)
    with RunningServer(engine, **settings) as server, client_of(server) as client:
        batch = client.batches.create(
            input_file_id=upload(client, lines), endpoint=COMPLETIONS, completion_window="24h"
        )
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 3)
        engine.close()
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10)
        time.sleep(2)
        batch = client.batches.retrieve(batch.id)
        assert (batch.status, batch.request_counts.failed) == ("in_progress", 0)
    with RunningServer(make_engine(None), **settings) as server, client_of(server) as client:
        batch = ended(client, batch.id)
        counts = batch.request_counts
        assert (batch.status, counts.completed, counts.failed) == ("completed", 60, 0)


def test_the_oldest_batches_are_forgotten(make_engine, tmp_path: Path):
    settings = {"api_keys": KEYS, "files_dir": str(tmp_path), "max_files": 3}
    with RunningServer(make_engine(None), **settings) as server, client_of(server) as client:
        file_id = upload(client, [line("a", {})])
        asked = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        ids = []
        for _ in range(5):
            batch = ended(client, client.batches.create(**asked).id)
            client.files.delete(batch.error_file_id)
            ids.append(batch.id)
        assert {batch.id for batch in client.batches.list()} == set(ids[2:])
        for _ in range(2):
            upload(client, ["x"])
        before = set(tmp_path.iterdir())
        for _ in range(3):
            with pytest.raises(openai.APIStatusError, match="delete some"):
                client.batches.create(**asked)
        assert set(tmp_path.iterdir()) == before


def test_a_tenant_may_have_so_many_bytes(make_engine):
    settings = {"api_keys": KEYS, "max_tenant_file_bytes": 4000}
    with RunningServer(make_engine(None), **settings) as server, client_of(server) as client:
        first = upload(client, ["x" * 1500])
        with pytest.raises(openai.APIStatusError, match="the limit is 4000") as error:
            upload(client, ["x" * 2500])
        assert error.value.status_code == 413
        with client_of(server, "blue") as other:
            upload(other, ["x" * 2500])
        client.files.delete(first)
        # What is coming counts as well.
        head = {
            "content_type": "multipart/form-data; boundary=b",
            "authorization": f"Bearer {KEYS['red']}",
        }
        with server.connect() as coming:
            coming.sendall(request_bytes("POST", "/v1/files", b"-" * 3000, **head)[:-3000])
            store = server.app.state.files
            wait_until(lambda: server.call(lambda: store._coming_bytes["red"]) == 3000)
            with pytest.raises(openai.APIStatusError, match="the limit is 4000"):
                upload(client, ["x" * 1500])
        wait_until(lambda: server.call(lambda: store._coming_bytes["red"]) == 0)
        upload(client, ["x" * 2500])


def test_uploads_are_kept_where_files_are(make_engine, tmp_path: Path, monkeypatch):
    settings = {"api_keys": KEYS, "files_dir": str(tmp_path / "files")}
    with RunningServer(make_engine(None), **settings) as server, client_of(server) as client:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        file_id = upload(client, ["x" * 3_000_000])
        assert client.files.retrieve(file_id).bytes == 3_000_000


def test_files_of_a_server_without_a_directory_go_with_it(make_engine):
    with RunningServer(make_engine(None), api_keys=KEYS) as server, client_of(server) as client:
        upload(client, ["x"])
        directory = server.app.state.files.directory
        assert len(list(directory.glob("*"))) == 2
    assert not directory.exists()
