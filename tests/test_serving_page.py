"""The whole server as people look at it: `ellm top`, and the dashboard in a real browser."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator

import httpx
import pytest
from engine_requests import greedy

from ellm_jax.cli import main
from ellm_jax.serving.run import serve
from ellm_jax.serving.settings import ServeConfig

KEY, ADMIN_KEY = "k" * 32, "a" * 32
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# As root, in containers, and without anything that would call home.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]


@pytest.fixture
def server(tiny_checkpoint, make_engine) -> Iterator[tuple[str, object]]:
    """Address and engine of a server with keys."""
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), device_memory="32MiB", host_memory="8MiB"
    )
    config = ServeConfig(
        model_name="<b>small</b>",
        http="127.0.0.1:0",
        api_keys={"ann": KEY},
        admin_key=ADMIN_KEY,
        drain_s=1,
    )
    listening = threading.Event()
    addresses: dict[str, str] = {}
    loops: list[asyncio.AbstractEventLoop] = []
    stop = asyncio.Event()

    async def run() -> int:
        loops.append(asyncio.get_running_loop())
        return await serve(engine, config, on_listening=tell, stop=stop)

    def tell(found) -> None:
        addresses.update(found.addresses)
        listening.set()

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(asyncio.run(run())), daemon=True)
    thread.start()
    assert listening.wait(60)
    yield f"http://{addresses['http']}", engine
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(60)
    assert codes == [0]


def test_top_and_a_scrape_of_a_real_server(server, monkeypatch, capsys):
    url, engine = server
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("ELLM_API_KEY", KEY)
    engine.generate([5, 6, 7], greedy(20))
    assert main(["top", url, "--once"]) == 0
    assert "<b>small</b>" in capsys.readouterr().out
    assert main(["top", url, "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["device"].values()) == found["limit_bytes"] == 32 * 2**20
    with httpx.Client(base_url=url, trust_env=False) as web:
        assert web.get("/health").status_code == 200
        for path in ("/metrics", "/dashboard", "/dashboard/page.js", "/dashboard/snapshots"):
            assert web.get(path).status_code == 401, path
            reply = web.get(path, headers={"authorization": f"Bearer {KEY}"})
            assert reply.status_code == 200, path
        reply = web.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        assert "ellm_output_tokens_total 20.0" in reply.text


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_page_in_a_browser(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    url, engine = server
    problems: list[str] = []
    asked: set[str] = set()
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_context(
            http_credentials={"username": "me", "password": KEY},
            viewport={"width": 390, "height": 844},
        ).new_page()
        page.on("console", lambda said: problems.append(said.text) if _bad(said) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"{url}/dashboard")
        page.locator("#state.live").wait_for(timeout=30_000)
        assert page.inner_text("#model") == "<b>small</b>", "what is shown is text, not HTML"
        assert page.inner_text("#used-of").startswith("of 32")
        for card in page.locator(".card, .tile").all():
            box = card.bounding_box()
            assert box is None or box["x"] + box["width"] <= 390, "it does not fit a phone"
        assert page.locator("#memory path.area").count() == 6
        page.click("#owners button:has-text('weights')")
        playwright.expect(page.locator("#memory path.area")).to_have_count(5)

        futures = [engine.submit([5, 6, i], greedy(300)) for i in range(4)]
        page.fill("input[name=device]", "40MiB")
        page.fill("input[name=key]", "wrong" * 8)
        page.click("form button")
        page.locator("#answer.bad").wait_for(timeout=30_000)
        assert "unknown" in page.inner_text("#answer")
        assert engine.memory().limit_bytes == 32 * 2**20
        problems.clear()  # browsers note every 401
        page.fill("input[name=key]", ADMIN_KEY)
        page.click("form button")
        page.locator("#answer.good").wait_for(timeout=30_000)
        assert engine.memory().limit_bytes == 40 * 2**20
        for future in futures:
            assert len(future.result(timeout=60).token_ids) == 300
        playwright.expect(page.locator("#used-of")).to_contain_text("40", timeout=30_000)
        playwright.expect(page.locator("#events")).to_contain_text("resize", timeout=30_000)
        browser.close()
    assert not problems
    assert all(each.startswith(url) for each in asked), asked


def _bad(said) -> bool:
    return said.type in ("error", "warning")
