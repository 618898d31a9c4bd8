"""Trace files of every format, what is made of them, and the prompts that stand for them."""

import itertools
import json
from pathlib import Path

import pytest

from ellm_jax.bench.traces import (
    BLOCK_TOKENS,
    FORMATS,
    TraceRequest,
    WorkloadError,
    at_poisson_rate,
    at_rate,
    clamped,
    estimated_tokens,
    load_trace,
    read_trace,
    repeated,
)
from ellm_jax.bench.workload import make_workload, workload_lines

SAMPLES = Path(__file__).parent / "traces"


def words(text: str) -> int:
    return len(text.split())


def test_our_own_jsonl() -> None:
    given, short, long = load_trace(SAMPLES / "ours.jsonl")
    assert given == TraceRequest(0.0, 3, 2, id="given", token_ids=(5, 6, 7))
    assert short == TraceRequest(0.5, 40, 4, id="1")
    assert long == TraceRequest(1.25, 600, 8, prefix=(3,), id="4")


def test_a_workload_survives_writing_and_reading() -> None:
    made = list(make_workload(40, (3, 9), (1, 4), 10.0, seed=4))
    assert read_trace(workload_lines(made)) == made
    assert made == list(make_workload(40, (3, 9), (1, 4), 10.0, seed=4))
    assert made != list(make_workload(40, (3, 9), (1, 4), 10.0, seed=5))
    assert {a.prompt_tokens for a in made} == set(range(3, 10))
    assert {a.output_tokens for a in made} == set(range(1, 5))
    # The mean of 40 exponential pauses of 0.1 s is within a factor of two of it.
    assert 2 < made[-1].arrival_s < 8
    others = load_trace(SAMPLES / "ours.jsonl")
    assert read_trace(workload_lines(others)) == others


def test_without_a_rate_all_arrive_at_once() -> None:
    assert {a.arrival_s for a in make_workload(9, (1, 2), (1, 2), None, seed=0)} == {0.0}


def test_azure_of_both_years() -> None:
    assert load_trace(SAMPLES / "azure_2023.csv") == [
        TraceRequest(0.0, 374, 44, id="2"),
        TraceRequest(pytest.approx(0.052, abs=1e-6), 396, 109, id="3"),
        TraceRequest(pytest.approx(1.02004, abs=1e-6), 91, 16, id="5"),
    ]
    assert load_trace(SAMPLES / "azure_2024.csv") == [
        TraceRequest(0.0, 2162, 5, id="2"),
        TraceRequest(pytest.approx(0.007405, abs=1e-6), 2399, 6, id="3"),
        TraceRequest(pytest.approx(1.5, abs=1e-6), 76, 15, id="4"),
    ]


def test_mooncake_shares_blocks() -> None:
    requests = load_trace(SAMPLES / "mooncake.jsonl")
    assert requests == [
        TraceRequest(0.0, 1100, 50, prefix=(0, 1, 2), id="1"),
        TraceRequest(0.0, 1300, 49, prefix=(0, 1, 3), id="2"),
        TraceRequest(3.052, 512, 79, prefix=(4,), id="3"),
        TraceRequest(6.104, 300, 31, prefix=(0,), id="4"),
    ]
    first, second, third, fourth = (
        request.prompt_ids(512, 7, index) for index, request in enumerate(requests)
    )
    assert [len(p) for p in (first, second, third, fourth)] == [1100, 1300, 512, 300]
    assert first[: 2 * BLOCK_TOKENS] == second[: 2 * BLOCK_TOKENS]
    assert first[2 * BLOCK_TOKENS :] != second[2 * BLOCK_TOKENS : 1100]
    assert first[:300] == fourth, "a last block that is not full is the start of the full one"
    assert third[:8] != first[:8]
    assert first == requests[0].prompt_ids(512, 7, 99), "the index matters for what is not shared"
    assert first != requests[0].prompt_ids(512, 8, 0)


def test_a_prefix_may_be_shorter_than_the_prompt() -> None:
    request = TraceRequest(0.0, 600, 1, prefix=(9,))
    one, other = (request.prompt_ids(1000, 0, index) for index in (0, 1))
    assert one[:BLOCK_TOKENS] == other[:BLOCK_TOKENS]
    assert one[BLOCK_TOKENS:] != other[BLOCK_TOKENS:]
    assert len(one) == len(other) == 600


def test_sharegpt_takes_the_first_answered_question() -> None:
    lake, three = load_trace(SAMPLES / "sharegpt.json", count_tokens=words)
    question = "How deep is the lake behind the mill?"
    assert lake == TraceRequest(0.0, 8, 13, prompt=question, id="a_0")
    assert three == TraceRequest(0.0, 3, 3, prompt="Zähle bis drei.", id="c_0")
    assert lake.prompt_ids(50_000, 0, 0, lambda text: [len(w) for w in text.split()]) == [
        *(3, 4, 2, 3, 4, 6, 3, 5)
    ]
    random = lake.prompt_ids(50_000, 0, 0)
    assert len(random) == 8
    # Sixteen bytes, one of the letters taking two of them.
    assert load_trace(SAMPLES / "sharegpt.json")[1].prompt_tokens == 4


def test_burstgpt_leaves_failures_out() -> None:
    assert load_trace(SAMPLES / "burstgpt.csv") == [
        TraceRequest(0.0, 472, 18, id="2"),
        TraceRequest(113.0, 417, 276, id="4"),
    ]
    newer = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n1,x,2,GPT-4,3,4"
    )
    assert read_trace(newer.splitlines()) == [TraceRequest(0.0, 3, 4, id="2")]


def test_formats_can_be_named_and_limited(tmp_path: Path) -> None:
    for sample in sorted(SAMPLES.iterdir()):
        name = {"ours": "jsonl"}.get(sample.stem, sample.stem.split("_")[0])
        assert name in FORMATS
        assert load_trace(sample, name) == load_trace(sample)
        assert len(load_trace(sample, limit=1)) == 1
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + (SAMPLES / "burstgpt.csv").read_bytes())
    assert len(load_trace(marked)) == 2
    turns = [{"from": "user", "value": "a b"}, {"from": "assistant", "value": "c"}]
    line = json.dumps({"conversations": turns})
    assert read_trace([line], count_tokens=words)[0].prompt == "a b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: "),
        ("3", "line 1: '3' begins no format"),
        ('{"output_len": 3}', "line 1: give one of prompt_len"),
        ('\n{"prompt_len": 3, "prompt_token_ids": [1], "output_len": 3}', "line 2: give one of"),
        ('{"prompt_len": 0, "output_len": 3}', "prompt_len=0"),
        ('{"prompt_len": 3}', "output_len=None"),
        ('{"prompt_len": 3, "output_len": true}', "output_len=True"),
        ('{"prompt_token_ids": ["a"], "output_len": 3}', "prompt_token_ids"),
        ('{"prompt_token_ids": [], "output_len": 3}', "prompt_len=0"),
        ('{"prompt_len": 3, "output_len": 3, "prefix": [-1]}', "prefix must be"),
        ('{"prompt_len": 3, "output_len": 3, "arrival_s": -1}', "arrival_s=-1"),
        ('{"prompt_len": 3, "output_len": 3, "arrival_s": NaN}', "arrival_s=nan"),
        ('{"prompt_len": 3, "output_len": 3, "arival_s": 1}', "'arival_s'"),
        (f'{{"prompt_len": 3, "output_len": 3, "arrival_s": {10**400}}}', "arrival_s=1000"),
        ("[" * 100_000, "the array: "),
        ("[3]", "conversation 1: not a JSON object"),
        ('[{"id": 1}]', "conversation 1: no list 'conversations'"),
        ("", "no requests"),
        ("\n \n", "no requests"),
        ("\na,b\n1,2\n", "line 2: 'a,b' begins no format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: TIMESTAMP='yester"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "line 2: fewer"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,-1,2\n",
            "ContextTokens='-1'",
        ),
        ("Timestamp,Model,Request tokens,Response tokens\nx,m,1,2\n", "line 2: Timestamp='x'"),
        ("Timestamp,Model,Request tokens,Response tokens\nnan,m,1,2\n", "line 2: Timestamp=nan"),
        ('{"timestamp": 0, "input_length": 9, "hash_ids": []}', "line 1: no field 'output_length'"),
        ('{"timestamp": 0, "input_length": 9.5, "output_length": 1}', "input_length=9.5"),
        (
            '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [true]}',
            "hash_ids must be",
        ),
    ],
)
def test_a_bad_line_is_named(text: str, said: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_trace(text.splitlines(keepends=True))
    assert said in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    binary = tmp_path / "trace.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"trace\.bin is not UTF-8"):
        load_trace(binary)
    with pytest.raises(WorkloadError, match=r"mooncake\.jsonl: line 1: unknown field"):
        load_trace(SAMPLES / "mooncake.jsonl", "jsonl")
    with pytest.raises(WorkloadError, match="no column 'TIMESTAMP'"):
        load_trace(SAMPLES / "burstgpt.csv", "azure")
    with pytest.raises(WorkloadError, match="no format 'parquet'; there is jsonl"):
        load_trace(SAMPLES / "burstgpt.csv", "parquet")
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "nowhere")


def test_clamping_cuts_what_is_known_of_the_prompt() -> None:
    long = TraceRequest(0.0, 1300, 90, prefix=(4, 5, 6))
    given = TraceRequest(0.0, 3, 9, token_ids=(1, 2, 3))
    cut, kept = clamped([long, given], 513, 50)
    assert (cut.prompt_tokens, cut.output_tokens, cut.prefix) == (513, 50, (4, 5))
    assert cut.prompt_ids(100, 0, 0) == long.prompt_ids(100, 0, 0)[:513]
    assert kept == TraceRequest(0.0, 3, 9, token_ids=(1, 2, 3))
    assert clamped([given], 2)[0].prompt_ids(100, 0, 0) == [1, 2]
    assert clamped([long]) == [long]


def test_a_rate_scales_pauses_and_keeps_bursts() -> None:
    requests = [TraceRequest(at_s, 1, 1) for at_s in (3.0, 3.0, 5.0, 9.0)]
    scaled = [r.arrival_s for r in at_rate(requests, 1.0)]
    assert scaled == pytest.approx([0.0, 0.0, 1.0, 3.0])
    assert (len(scaled) - 1) / scaled[-1] == pytest.approx(1.0)
    with pytest.raises(WorkloadError, match="all arrive at once"):
        at_rate(requests[:2], 1.0)


def test_poisson_arrivals_are_the_same_at_every_rate() -> None:
    requests = [TraceRequest(0.0, 1, 1)] * 400
    slow = [r.arrival_s for r in at_poisson_rate(requests, 2.0, seed=3)]
    fast = [r.arrival_s for r in at_poisson_rate(requests, 8.0, seed=3)]
    assert slow[0] == 0.0
    assert [4 * s for s in fast] == pytest.approx(slow)
    assert sorted(slow) == slow
    # 400 pauses: their mean is within a fifth of half a second.
    assert slow[-1] / 399 == pytest.approx(0.5, rel=0.2)
    assert slow != [r.arrival_s for r in at_poisson_rate(requests, 2.0, seed=4)]


def test_repeating_goes_on_in_time_and_shares_nothing_with_the_lap_before() -> None:
    requests = load_trace(SAMPLES / "mooncake.jsonl")
    twice = repeated(requests, 9)
    assert [r.prompt_tokens for r in twice] == [1100, 1300, 512, 300] * 2 + [1100]
    arrivals = [r.arrival_s for r in twice]
    assert arrivals == sorted(arrivals)
    assert arrivals[4] == pytest.approx(6.104 * 4 / 3)
    laps = [{block for r in twice[i : i + 4] for block in r.prefix or ()} for i in (0, 4, 8)]
    assert not any(one & other for one, other in itertools.combinations(laps, 2))
    assert repeated(requests, 2) == requests[:2]


def test_estimated_tokens() -> None:
    assert [estimated_tokens(text) for text in ("", "a", "abcd", "abcde", "\ud800")] == [
        0,
        1,
        1,
        2,
        1,
    ]
