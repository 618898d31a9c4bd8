"""The dashboard: its snapshots, what its pages may do, and who may resize."""

import asyncio
import json
import re
from collections import Counter

import httpx
import pytest
from engine_requests import greedy

from ellm_jax.serving.dashboard import PATH
from ellm_jax.serving.http.app import make_app
from ellm_jax.serving.latencies import Latencies
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.snapshots import Sampler
from ellm_jax.serving.tenants import Keys
from ellm_jax.serving.watch import Watch

KEY, ADMIN_KEY = "k" * 32, "a" * 32
CONFIG = ServeConfig(api_keys={"ann": KEY}, admin_key=ADMIN_KEY)


def as_tenant(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def served(engine, use, config=CONFIG):
    """Runs `use` with a client of the dashboard's routes, behind the server's keys."""

    async def run():
        watch = Watch(engine, "small")
        service = Service(engine, config, watch.observer)
        async with watch.looking_at(service) as routes:
            app = make_app(service, Keys(config), config, routes)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://host:8000") as web:
                await use(web, service)
        await service.close()

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.fixture(scope="module")
def paths() -> list[str]:
    files = ["", "/page.css", "/page.js", "/chart.js", "/format.js", "/limits.js", "/icon.svg"]
    return [PATH + name for name in files]


def test_pages_load_nothing_from_elsewhere(tiny_checkpoint, make_engine, paths):
    engine = make_engine(tiny_checkpoint("llama"))
    texts = {}

    async def use(web: httpx.AsyncClient, _: Service) -> None:
        for path in [*paths, f"{PATH}/snapshots"]:
            reply = await web.get(path, headers=as_tenant(KEY))
            assert reply.status_code == 200, path
            policy = reply.headers["content-security-policy"]
            rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
            assert rules["default-src"] == "'none'"
            assert rules["frame-ancestors"] == "'none'"
            assert set(rules.values()) <= {"'none'", "'self'"}, "something else is allowed"
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["cache-control"] == "no-store"
            texts[path] = reply.text

    served(engine, use)
    page = texts[PATH]
    linked = re.findall(r'(?:src|href)="([^"]+)"', page)
    linked += re.findall(r'from "\./([^"]+)"', texts[f"{PATH}/page.js"])
    names = {name.removeprefix("dashboard/") for name in linked}
    assert names == {path.removeprefix(f"{PATH}/") for path in paths[1:]}
    for path, text in texts.items():
        urls = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert not urls, f"{path} names {urls}"
    # What the policy would not let through.
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    scripts = "".join(text for path, text in texts.items() if path.endswith(".js"))
    assert not re.search(r"innerHTML|insertAdjacentHTML|eval\(|new Function", scripts)


def test_browsers_are_asked_for_a_key(tiny_checkpoint, make_engine, paths):
    """With a key as the password, on these pages only; and never for what a page posts."""
    engine = make_engine(tiny_checkpoint("llama"))

    async def use(web: httpx.AsyncClient, _: Service) -> None:
        right = httpx.BasicAuth("anybody", KEY)
        for path in [*paths, f"{PATH}/snapshots"]:
            reply = await web.get(path)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"].startswith("Basic realm=")
            assert (await web.get(path, auth=right)).status_code == 200
            assert (await web.get(path, auth=httpx.BasicAuth(KEY, "x"))).status_code == 401
        for path in ("/metrics", "/v1/models", "/dashboardx"):
            reply = await web.get(path, auth=right)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
        for header in ("Basic", "Basic !", "Basic /w==", "Basic " + "A" * 999, "basic Og=="):
            reply = await web.get(PATH, headers={"authorization": header})
            assert reply.status_code == 401, header
        reply = await web.post(f"{PATH}/resize", json={}, headers=as_tenant("wrong" * 9))
        assert reply.headers["www-authenticate"] == "Bearer"
        admin = httpx.BasicAuth("me", ADMIN_KEY)
        reply = await web.post(f"{PATH}/resize", json={"device_memory": "40MiB"}, auth=admin)
        assert reply.json()["limit_bytes"] == 40 * 2**20

    served(engine, use)


def test_snapshots_are_sent_once(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), device_memory="32MiB")

    async def use(web: httpx.AsyncClient, service: Service) -> None:
        for _ in range(100):
            reply = await web.get(f"{PATH}/snapshots", headers=as_tenant(KEY))
            if len(reply.json()["snapshots"]) >= 2:
                break
            await asyncio.sleep(0.1)
        said = reply.json()
        assert (said["model"], said["admin"], said["resizable"]) == ("small", False, True)
        numbers = [each["number"] for each in said["snapshots"]]
        assert numbers == list(range(1, len(numbers) + 1))
        for each in said["snapshots"]:
            assert sum(each["device"].values()) == each["limit_bytes"] == 32 * 2**20
        newer = await web.get(f"{PATH}/snapshots?since={numbers[0]}", headers=as_tenant(ADMIN_KEY))
        assert newer.json()["snapshots"][0]["number"] == numbers[1]
        assert newer.json()["admin"] is True
        last = await web.get(f"{PATH}/snapshots?most=1", headers=as_tenant(KEY))
        assert len(last.json()["snapshots"]) == 1
        none = await web.get(f"{PATH}/snapshots?most=0", headers=as_tenant(KEY))
        assert none.json()["snapshots"] == []
        for bad in ("since=-1", "since=x", "most=1e3", "since=" + "9" * 400, "since=٣"):
            reply = await web.get(f"{PATH}/snapshots?{bad}", headers=as_tenant(KEY))
            assert reply.status_code == 400, bad

    served(engine, use)


def test_only_the_admin_resizes(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), device_memory="32MiB")

    async def use(web: httpx.AsyncClient, service: Service) -> None:
        async def resize(body: object, key: str = ADMIN_KEY, **headers: str) -> httpx.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            given = {"content-type": "application/json", **as_tenant(key), **named}
            return await web.post(f"{PATH}/resize", content=sent, headers=given)

        wanted = {"device_memory": "40MiB"}
        running = asyncio.create_task(service.complete(_call(200)))
        assert (await resize(wanted, KEY)).status_code == 403
        assert engine.memory().limit_bytes == 32 * 2**20
        reply = await resize(wanted)
        assert reply.status_code == 200
        assert reply.json() == {"limit_bytes": 40 * 2**20, "host_limit_bytes": 0}
        assert engine.memory().limit_bytes == 40 * 2**20
        assert (await resize(wanted, origin="http://host:8000")).status_code == 200

        # What a browser with the admin's key would send for another site's page.
        for headers in (
            {"origin": "http://elsewhere.example"},
            {"origin": "null"},
            {"sec_fetch_site": "cross-site"},
            {"sec_fetch_site": "same-site"},
            {"content_type": "text/plain"},
            {"content_type": "application/x-www-form-urlencoded"},
        ):
            reply = await resize({"device_memory": "33MiB"}, **headers)
            assert reply.status_code == 403, headers
        for bad in ({}, {"device_memory": "much"}, {"limit": 3}, {"device_memory": 1.5}, [], b"{"):
            assert (await resize(bad)).status_code == 400, bad
        reply = await resize({"device_memory": "1MiB"})
        assert reply.status_code == 400
        assert "the smallest step need" in reply.json()["error"]["message"]
        assert (await resize(b'{"a": "' + b"x" * 5000 + b'"}')).status_code == 413
        assert (await resize(b"\xff\xfe")).status_code == 400
        assert engine.memory().limit_bytes == 40 * 2**20
        assert len((await running).token_ids) == 200
        assert (await web.get(f"{PATH}/resize", headers=as_tenant(ADMIN_KEY))).status_code == 405

    served(engine, use)


def _call(count: int):
    from ellm_jax.serving.call import Call
    from ellm_jax.serving.tenants import Tenant

    return Call([3, 4, 5], greedy(count), Tenant("ann"))


def test_metrics_by_tenant_are_for_the_admin(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))

    async def use(web: httpx.AsyncClient, service: Service) -> None:
        await service.complete(_call(5))
        seen = await web.get("/metrics", headers=as_tenant(KEY))
        assert seen.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "ellm_output_tokens_total 5.0" in seen.text
        assert "ann" not in re.findall(r'tenant="(\w+)"', seen.text)
        seen = await web.get("/metrics", headers=as_tenant(ADMIN_KEY))
        assert set(re.findall(r'tenant="(\w+)"', seen.text)) == {"ann"}

    served(engine, use)


def test_the_ring_is_bounded_and_its_moves_add_up(tiny_checkpoint, make_engine):
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), device_memory="10MiB", max_num_seqs=8
    )
    clock = iter(range(10**6))
    sampler = Sampler(engine, Latencies(), kept=7, wall_clock=lambda: float(next(clock)))
    futures = [engine.submit([5, 6, i], greedy(250)) for i in range(8)]
    counts: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    tokens = 0.0

    def take() -> None:
        nonlocal tokens
        snapshot = sampler.take()
        assert sum(snapshot.device.values()) == snapshot.limit_bytes
        tokens += snapshot.output_tokens_per_s  # a second each
        for kind, move in snapshot.moves.items():
            assert move.count > 0
            counts[kind] += move.count
            moved[kind] += move.bytes

    while not all(future.done() for future in futures):
        take()
    for future in futures:
        assert len(future.result(timeout=60).token_ids) == 250
    engine.resize(device_memory="9MiB")
    engine.resize(device_memory="12MiB")
    take()
    stats = engine.stats()
    assert counts == stats.moves
    assert moved == stats.moved_bytes
    assert moved["resize"] == 2 * 2**20
    assert tokens == pytest.approx(stats.output_tokens) == 2000
    assert len(sampler.ring) == 7
    assert [s.number for s in sampler.since(0)] == [s.number for s in sampler.ring]
    assert sampler.since(sampler.ring[-1].number) == []
    assert [s.number for s in sampler.since(0, 2)] == [s.number for s in sampler.ring][-2:]


def test_a_reset_of_the_statistics_is_no_negative_rate(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))
    engine.generate([5], greedy(30))
    clock = iter(range(100))
    sampler = Sampler(engine, Latencies(), wall_clock=lambda: float(next(clock)))
    engine.reset_stats()
    engine.generate([5], greedy(4))
    snapshot = sampler.take()
    assert snapshot.output_tokens_per_s == 4
    assert all(move.count > 0 for move in snapshot.moves.values())


def test_a_failing_engine_does_not_end_the_sampler(tiny_checkpoint, make_engine, caplog):
    engine = make_engine(tiny_checkpoint("llama"))
    sampler = Sampler(engine, Latencies(), interval_s=0.001)
    memory = engine.memory
    failing = True

    def report():
        if failing:
            raise RuntimeError("no figures now")
        return memory()

    engine.memory = report

    async def run() -> None:
        nonlocal failing
        task = asyncio.create_task(sampler.run())
        await asyncio.sleep(0.02)
        failing = False
        async with asyncio.timeout(30):
            while not sampler.ring:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    assert "no figures now" in caplog.text
