"""What serving costs, measured: the figures are of whole answers, and failures are counted."""

import asyncio
import json

import pytest

from ellm_jax.bench.serving.measure import DIRECT, Work, measure_serving, medians
from ellm_jax.cli import main


def test_each_side_is_measured(tiny_checkpoint, capsys, tmp_path):
    saved = tmp_path / "r.json"
    options = "--device-memory 64MiB --quiet --requests 3 --prompt-len 9:12 --output-len 5"
    options += " --alone 2 --streams 6 --stream-tokens 4 --repeats 2"
    model = str(tiny_checkpoint("llama"))
    status = main(["bench", "serve", "--model", model, *options.split(), "--save", str(saved)])
    assert status == 0
    assert "added ms" in capsys.readouterr().out
    sides = json.loads(saved.read_text())["sides"]
    assert list(sides) == [DIRECT, "http", "grpc"]
    for name, side in sides.items():
        assert [run["failed"] for run in side["runs"]] == [0, 0]
        assert all(run["output_tokens_per_s"] > 0 for run in side["runs"])
        assert all(run["ttft_ms"]["p50"] > 0 for run in side["runs"])
        if name != DIRECT:
            crowd = side["runs"][0]
            assert (crowd["streams"], crowd["streams_failed"]) == (6, 0)
            assert 0 < crowd["physical_bytes"] <= crowd["limit_bytes"] == 64 * 2**20
            assert 0 <= crowd["loop_late_p99_ms"] <= crowd["loop_late_max_ms"]


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_answers_that_fail_are_counted(make_engine, tiny_checkpoint, transport):
    """What the model's context does not hold is refused, by the server as it is by the engine."""
    engine = make_engine(tiny_checkpoint("llama"))
    longest = engine.model_config.max_context
    work = Work(requests=2, prompt_len=(9, 9), output_len=(5, 6), alone=1, streams=4)
    too_long = Work(**(vars(work) | {"stream_tokens": longest}))

    def measured(asked: Work):
        found = measure_serving(engine, [transport], asked, rounds=1, tell=lambda text: None)
        return asyncio.run(asyncio.wait_for(found, 300))[transport][0]

    assert measured(work)["streams_failed"] == 0
    assert measured(too_long)["streams_failed"] == 4


def test_medians_over_rounds():
    def run(rate: float, ttft_ms: float, **more: float) -> dict:
        return {"output_tokens_per_s": rate, "ttft_ms": {"p50": ttft_ms}, **more}

    found = {
        DIRECT: [run(100, 10), run(110, 12), run(90, 11)],
        "http": [run(99, 14, streams=7), run(100, 15), run(90, 19)],
    }
    result = medians(found)
    assert result["http"]["of_direct"] == pytest.approx(0.99)
    assert result["http"]["added_ttft_ms"] == pytest.approx(4)
    assert result["http"]["streams"] == 7


def test_a_transport_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--transport", "carrier-pigeon"])
    assert "carrier-pigeon" in capsys.readouterr().err
