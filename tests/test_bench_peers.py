"""Other engines beside ours: the protocol, the rounds, and whatever an engine may do wrong."""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ellm_jax.assembly import TINY_MODEL
from ellm_jax.bench.figures import figures_of
from ellm_jax.bench.peers import cores as cores_module
from ellm_jax.bench.peers.catalogue import CHILD, OURS, PEERS, Peer, comparable
from ellm_jax.bench.peers.comparison import (
    START,
    EngineRuns,
    Rules,
    Run,
    agreement,
    best_of,
    compare,
    ratios,
)
from ellm_jax.bench.peers.cores import choose_cores
from ellm_jax.bench.peers.environments import Installer
from ellm_jax.bench.peers.launching import Launches
from ellm_jax.bench.peers.report import report, table
from ellm_jax.bench.peers.scenarios import PeerWorkload, read_answers
from ellm_jax.bench.peers.session import Launch, PeerError, PeerLost, Session
from ellm_jax.cli import main

FAKE = Path(__file__).parent / "fake_peer.py"
CORE = str(min(os.sched_getaffinity(0)))
WORKLOAD = PeerWorkload(
    prompt_tokens=9,
    output_tokens=5,
    long_prompt_tokens=40,
    long_output_tokens=3,
    batch=((4, 3), (6, 2)),
)
RULES = Rules(WORKLOAD.scenarios(), rounds=1, vocab_size=50, timeout_s=10.0)
SINGLE = {"decode_tokens_per_s", "ttft_ms", "long_ttft_s", "long_decode_tokens_per_s"}
AROUND = {"first_start_s", "first_peak_memory_gib"}
LATER = {"start_s", "peak_memory_gib"}


def fake(name: str, **settings: Any) -> Launch:
    command = (sys.executable, "-I", str(CHILD), "serve", str(FAKE), CORE)
    return Launch(name, command, dict(os.environ), settings)


def script(name: str, code: str) -> Launch:
    return Launch(name, (sys.executable, "-I", "-c", code), dict(os.environ))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ignore(_: str) -> None:
    pass


def test_an_engine_is_asked_and_answers() -> None:
    with Session(fake("a", precision="int8")) as session:
        loaded = session.ask({"do": "load", "precision": "int8"}, 10)
        assert loaded["precision"] == "int8"
        assert loaded["versions"]["cores"] == CORE
        assert session.ask({"do": "warm_up"}, 10) == {"ok": True}
        asked = {"do": "run", "prompts": [[1, 2], [5]], "output_tokens": [3, 2]}
        answers = session.ask(asked, 10)["answers"]
        assert [answer["tokens"] for answer in answers] == [[3, 4, 5], [5, 6]]
        assert 0 < answers[0]["first_s"] < answers[0]["last_s"] < answers[1]["first_s"]
        with pytest.raises(PeerError, match="KeyError: 'sing'"):
            session.ask({"do": "sing"}, 10)
        assert session.ask({"do": "warm_up"}, 10) == {"ok": True}
        pid = int(loaded["versions"]["pid"])
        assert is_alive(pid)
    assert not is_alive(pid)


def test_memory_counts_what_the_engine_starts() -> None:
    with Session(fake("a")) as session:
        session.ask({"do": "load", "hog_bytes": 200 << 20}, 10)
        before = session.peak_bytes
        session.ask({"do": "warm_up"}, 10)
        grown = session.peak_bytes - before
    assert 200 << 20 < grown < 260 << 20


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no such library')", "ended with exit code 1: no such library"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("print('ready for anything')", "is no answer: 'ready for anything'"),
        ("print('[1, 2]')", "is no answer"),
        ("print('{\"ok\": 1}')", "is no answer"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 50)", "is no answer"),
        ("print('[' * 100000)", "is no answer"),
        ("import time; time.sleep(1000)", "no answer in 1 s to 'load'; raise --timeout"),
        ("import sys; sys.stdin.close(); import time; time.sleep(1000)", "no answer in 1 s"),
    ],
)
def test_what_does_not_speak_the_protocol_is_lost(code: str, reason: str) -> None:
    begin_s = time.monotonic()
    with Session(script("a", code)) as session, pytest.raises(PeerLost) as lost:
        # More than a pipe holds: an engine that never reads must not block us.
        session.ask({"do": "load", "padding": "x" * (1 << 20)}, 1.0)
    assert reason in str(lost.value)
    assert time.monotonic() - begin_s < 15


def test_a_command_that_is_missing_is_lost() -> None:
    with pytest.raises(PeerLost, match="/no/such cannot be started: No such file"):
        Session(Launch("a", ("/no/such",), {}))


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("refuses", "RuntimeError: no room"),
        ("stops early", "request 0: it gave 2 tokens of 3"),
        ("dies", "the process ended with exit code 3: compiling | it hurts"),
        ("hangs", "no answer in 2 s to 'run'"),
    ],
)
def test_what_fails_is_told_and_the_rest_is_measured(mood: str, reason: str) -> None:
    """The scenario that fails comes before another, which an engine that is lost is started for."""
    one, long, several = WORKLOAD.scenarios()
    rules = Rules([one, several, long], rounds=2, vocab_size=50, timeout_s=2.0)
    begin_s = time.monotonic()
    told: list[str] = []
    # Tokens that take long, beside what a busy machine adds.
    ours, good_one = (fake(name, token_s=0.03) for name in (OURS, "good"))
    found = compare(ours, [fake("bad", mood=mood), good_one], rules, told.append)
    assert time.monotonic() - begin_s < 40
    bad, good = found["bad"], found["good"]
    assert list(bad.failures) == ["2 requests"]
    assert reason in bad.failures["2 requests"]
    assert any(reason in text for text in told)
    assert bad.runs[0].figures.keys() == SINGLE | AROUND
    assert bad.runs[1].figures.keys() == SINGLE | LATER
    assert not good.failures
    assert [run.figures.keys() - SINGLE for run in good.runs] == [
        {"batch_tokens_per_s"} | around for around in (AROUND, LATER)
    ]
    # Ours ran beside each of the others, and is compared with the run that it was beside.
    assert [(r.round, r.beside) for r in found[OURS].runs] == [
        (1, "bad"),
        (1, "good"),
        (2, "good"),
        (2, "bad"),
    ]
    assert "batch_tokens_per_s" not in ratios(found, OURS, "bad")
    beside = [run for run in found[OURS].runs if run.beside == "good"]
    exact = statistics.median(
        own.figures["decode_tokens_per_s"] / run.figures["decode_tokens_per_s"]
        for own, run in zip(beside, good.runs, strict=True)
    )
    better = ratios(found, OURS, "good")["decode_tokens_per_s"]
    assert better == exact
    assert better == pytest.approx(1, abs=0.5)
    assert agreement(found, OURS, "good") == (12, 12)
    assert agreement(found, OURS, "bad") == (8, 8)
    for run, pid in zip(good.runs, [good.versions["pid"]], strict=False):
        assert run.figures
        assert not is_alive(int(pid))


def test_an_engine_that_does_not_start_is_left_out() -> None:
    rules = Rules(WORKLOAD.scenarios()[:1], rounds=2, vocab_size=50, timeout_s=5.0)
    peers = [fake("a", mood="does not load"), script("b", "print('hello')"), fake("c")]
    found = compare(fake(OURS), peers, rules, ignore)
    assert found["a"].failures == {START: "ValueError: there is no such precision"}
    assert "is no answer: 'hello'" in found["b"].failures[START]
    assert [len(found[name].runs) for name in "abc"] == [1, 1, 2]
    assert [found[name].median for name in "ab"] == [{}, {}]
    shown = table(report(found, WORKLOAD.titles()))
    assert "a: start failed: ValueError: there is no such precision" in shown
    assert "b: start failed" in shown
    head = shown.splitlines()[0].split()
    assert head == [OURS, "c"], "an engine without figures has a column"


def test_ours_once_a_round_changes_its_place() -> None:
    order: list[str] = []
    rules = Rules(WORKLOAD.scenarios()[:1], rounds=2, vocab_size=50, ours_each=False)
    found = compare(fake(OURS), [fake("a"), fake("b")], rules, order.append)
    assert order == [
        f"round {number} of 2: {name}"
        for number, names in ((1, (OURS, "a", "b")), (2, ("b", "a", OURS)))
        for name in names
    ]
    assert [run.beside for run in found[OURS].runs] == [None, None]
    assert ratios(found, OURS, "b").keys() >= {"ttft_ms", "start_s", "first_start_s"}


def test_ratios_and_the_best_by_hand() -> None:
    def runs(precision: str, *figures: dict[str, float], beside: Any = ()) -> EngineRuns:
        pairs = zip(figures, beside or [None] * len(figures), strict=True)
        made = [Run(1 + i // (2 if beside else 1), b, f) for i, (f, b) in enumerate(pairs)]
        return EngineRuns({"x": "1"}, precision, made)

    found = {
        OURS: runs(
            "bfloat16",
            {"decode_tokens_per_s": 100.0, "ttft_ms": 10.0},
            {"decode_tokens_per_s": 80.0, "ttft_ms": 30.0},
            {"decode_tokens_per_s": 60.0, "ttft_ms": 20.0},
            {"decode_tokens_per_s": 90.0},
            beside=("a", "b", "a", "b"),
        ),
        "a": runs(
            "float16 (KV x)", {"decode_tokens_per_s": 50.0, "ttft_ms": 20.0}, {"ttft_ms": 80.0}
        ),
        "b": runs("bfloat16", {"decode_tokens_per_s": 40.0}, {"decode_tokens_per_s": 45.0}),
        "c": runs("float32", {"decode_tokens_per_s": 400.0, "ttft_ms": 1.0}),
    }
    assert found[OURS].median == {"decode_tokens_per_s": 85.0, "ttft_ms": 20.0}
    assert ratios(found, OURS, "a") == {"decode_tokens_per_s": 2.0, "ttft_ms": 3.0}
    assert ratios(found, OURS, "b") == {"decode_tokens_per_s": 2.0}
    assert ratios(found, OURS, "c") == {}
    assert best_of(found, OURS) == {"decode_tokens_per_s": "a", "ttft_ms": "a"}
    assert comparable("int8 (bfloat16)", "int8 float32")
    assert not comparable("int8", "int4")
    assert not comparable("", "bfloat16")


def test_answers_that_cannot_be_are_refused() -> None:
    good = {"tokens": [1, 2], "first_s": 0.1, "last_s": 0.2}
    (answer,) = read_answers({"answers": [good]}, ((9, 2),), 0.3)
    assert (answer.tokens, answer.first_s, answer.last_s) == ((1, 2), 0.1, 0.2)
    for wrong, said in [
        ({}, "no list of 1 answers"),
        ({"answers": [good, good]}, "no list of 1 answers"),
        ({"answers": ["x"]}, "'x' is no answer"),
        ({"answers": [{**good, "tokens": "ab"}]}, "no tokens"),
        ({"answers": [{**good, "tokens": [1, 2.5]}]}, "no tokens"),
        ({"answers": [{**good, "tokens": [1, 2, 3]}]}, "3 tokens of 2"),
        ({"answers": [{**good, "first_s": None}]}, "no times"),
        ({"answers": [{**good, "first_s": 0.0}]}, "cannot be"),
        ({"answers": [{**good, "first_s": float("nan")}]}, "cannot be"),
        ({"answers": [{**good, "first_s": 0.2}]}, "cannot be"),
        ({"answers": [{**good, "last_s": 0.9}]}, "cannot be"),
    ]:
        with pytest.raises(PeerError, match=said):
            read_answers(wrong, ((9, 2),), 0.3)


def test_requests_are_the_same_for_all_and_others_each_time() -> None:
    one, _, several = WORKLOAD.scenarios()
    assert several.requests(50, (0, 1)) == several.requests(50, (0, 1))
    assert several.requests(50, (0, 1)) != several.requests(50, (0, 2))
    asked = several.requests(50, (0, 1))
    assert [len(prompt) for prompt in asked["prompts"]] == [4, 6]
    assert all(3 <= token < 50 for prompt in asked["prompts"] for token in prompt)
    assert asked["output_tokens"] == [3, 2]
    assert one.samples == 3
    big = PeerWorkload(long_prompt_tokens=5000).scenarios()[1].warm_up(50, (0,))
    assert (len(big["prompts"][0]), big["output_tokens"]) == (1024, [8])
    assert (WORKLOAD.max_model_len, WORKLOAD.kv_tokens) == (43, 43)
    assert PeerWorkload(long_prompt_tokens=0, batch=((100, 50),) * 4).kv_tokens == 600
    assert [s.name for s in PeerWorkload(long_prompt_tokens=0).scenarios()] == ["one request"]
    assert "long_ttft_s" not in PeerWorkload(long_prompt_tokens=0).titles()


def test_whole_cores_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(6):
        (tmp_path / f"cpu{core}").write_text(f"{core % 3},{core % 3 + 3}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 4, 5})
    monkeypatch.setattr(cores_module, "_SIBLINGS", str(tmp_path / "cpu{}"))
    assert choose_cores(2) == [1, 2]
    assert choose_cores(4) == [1, 2, 3, 4]
    assert choose_cores(None) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="may use 5 cores"):
        choose_cores(6)


def test_who_else_uses_the_cores_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(cores_module, "_STAT", stat)
    lines = "cpu 9 9 9 9 9 9 9 9\ncpu0 {} 0 5 {} 2 0 0 {} 0 0\ncpu10 0 0 0 0 0 0 0 0 0 0\nintr 5\n"
    stat.write_text(lines.format(10, 100, 0))

    def later(_: float) -> None:
        stat.write_text(lines.format(20, 160, 10))

    monkeypatch.setattr(time, "sleep", later)
    # Of 80 ticks, 10 of a user and 10 that the hypervisor took.
    assert cores_module.busy_share([0, 10]) == pytest.approx(0.25)
    assert cores_module.busy_share([7]) == 0.0
    run = Run(1, figures={"ttft_ms": 5.0}, busy_before=0.62)
    found = {OURS: EngineRuns({"x": "1"}, "bfloat16", [run])}
    assert "kept 62% of these cores busy" in table(report(found, {"ttft_ms": "first token (ms)"}))
    run.busy_before = 0.05
    assert "busy" not in table(report(found, {"ttft_ms": "first token (ms)"}))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Environments are this interpreter; of a peer called "absent" there is none. Names those that
    were asked for."""
    asked: list[str] = []

    def environment(_: Installer, peer: Peer) -> Path:
        asked.append(peer.name)
        if peer.name == "absent":
            raise PeerError("ERROR: No matching distribution found for absent")
        home = tmp_path / "venvs" / peer.name
        (home / "bin").mkdir(parents=True, exist_ok=True)
        if not (home / "bin" / "python").exists():
            (home / "bin" / "python").symlink_to(sys.executable)
        return home

    monkeypatch.setattr(Installer, "environment", environment)
    for name, converter in (("absent", None), ("fake", FAKE)):
        monkeypatch.setitem(PEERS, name, Peer(name, (), FAKE, converter))
    return asked


_SHORT = ["--alone-prompt", "12", "--alone-output", "6", "--requests", "3", "--rounds", "1"]
_SHORT += ["--prompt-len", "4:20", "--output-len", "2:6", "--quiet", "--long-prompt", "0"]


@pytest.mark.slow
def test_the_command_with_our_engine(
    installed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    saved, picture = tmp_path / "r.json", tmp_path / "p.png"
    command = ["bench", "peers", "--peer", "absent", "--peer", "fake", *_SHORT, "--threads", "1"]
    command += ["--venvs", str(tmp_path / "kept"), "--save", str(saved), "--label", "tiny"]
    assert main([*command, "--json", "--picture", str(picture)]) == 0
    written = json.loads(capsys.readouterr().out)
    assert json.loads(saved.read_text()) == written
    assert (written["kind"], written["threads"], written["label"]) == ("peers", 1, "tiny")
    engines = written["engines"]
    assert list(engines) == [OURS, "absent", "fake"]
    assert engines["absent"]["runs"] == []
    assert "No matching distribution" in engines["absent"]["failures"]["installation"]
    ours, other = engines[OURS], engines["fake"]
    assert ours["failures"] == other["failures"] == {}
    assert ours["precision"] == "bfloat16"
    assert ours["versions"].keys() >= {"ellm_jax", "jax"}
    expected = {"decode_tokens_per_s", "ttft_ms", "batch_tokens_per_s"} | AROUND
    assert ours["median"].keys() == other["median"].keys() == expected
    assert all(value > 0 for value in ours["median"].values())
    # A process with JAX takes more than one without.
    peak = "first_peak_memory_gib"
    assert ours["median"][peak] > 2 * other["median"][peak]
    assert other["ours_is_better_by"].keys() == expected
    assert written["best_peer"]["ttft_ms"]["name"] == "fake"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "picture", str(saved), "--output", str(tmp_path / "q.png")]) == 0
    figures = figures_of([written])
    assert list(figures["peak memory, its caches empty (GiB)"]["tiny"]) == [OURS, "fake"]


def test_install_only_and_what_cannot_be_asked(
    installed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "peers", "--peer", "fake", "--venvs", str(tmp_path / "kept"), *_SHORT]
    assert main([*command, "--install-only"]) == 0
    assert capsys.readouterr().out == "fake: ready\n"
    assert main([*command, "--peer", "absent", "--install-only", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["fake"] is None
    assert "No matching distribution" in shown["absent"]
    assert main([*command, "--precision", "int4", "--install-only"]) == 1
    assert "ValueError: there is no int4" in capsys.readouterr().out
    assert installed == ["fake", "fake", "absent", "fake"]
    empty = tmp_path / "converted"
    empty.mkdir()
    (empty / "config.json").write_text((TINY_MODEL / "config.json").read_text())
    for wrong, said in [
        (["--threads", "4096"], "may use"),
        (["--long-prompt", "100000"], "context is 1024"),
        (["--kv-memory", "1KiB"], "--kv-memory has to be"),
        (["--model", str(tmp_path / "none")], "none"),
        (["--model", str(empty)], "no safetensors"),
        (["--picture", str(tmp_path / "no" / "p.png")], "its folder is missing"),
    ]:
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_driver_of_transformers_says_what_ours_does(tmp_path: Path) -> None:
    """Both run the model in the package, in float32: the tokens are the same."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    settings = {"model": str(TINY_MODEL), "precision": "float32", "max_model_len": 256}
    settings |= {"max_requests": 2, "kv_limited": False, "kv_tokens": 512, "kv_bytes": 1 << 20}
    launches = Launches([int(CORE)], tmp_path, settings)
    home = tmp_path / "env"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    driver = PEERS["transformers"].driver
    theirs = Launch(
        "transformers",
        (sys.executable, "-P", str(CHILD), "serve", str(driver), CORE),
        launches.ours().env,
        launches.ours().settings,
    )
    asked = {"do": "run", "prompts": [[5, 9, 300, 41], [7, 1000]], "output_tokens": [20, 9]}
    tokens = []
    for launch in (launches.ours(), theirs):
        with Session(launch) as session:
            session.ask({"do": "load", **launch.settings}, 300)
            answers = read_answers(session.ask(asked, 300), ((4, 20), (2, 9)), 300)
            tokens.append([answer.tokens for answer in answers])
    assert tokens[0] == tokens[1]
