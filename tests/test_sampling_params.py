"""SamplingParams refuse what makes no sense, and say what would; outputs derive their times."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from ellm_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from ellm_jax.sampling import MAX_LOGPROBS, SamplingParams

NAN, INF = float("nan"), float("inf")


def test_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "structured": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", value) for value in (-0.1, NAN, INF, 1e-9, 1e39)]
    + [("top_p", value) for value in (0, -1, 1.01, NAN, 1e-320)]
    + [("top_k", value) for value in (-2, 2**31)]
    + [("min_p", value) for value in (-0.1, 1.1, NAN)]
    + [("repetition_penalty", value) for value in (0, -1, NAN, INF, 1e39, 1e-320)]
    + [("presence_penalty", value) for value in (-2.1, 2.1, NAN)]
    + [("frequency_penalty", value) for value in (-2.1, 2.1, NAN)]
    + [("seed", value) for value in (2**64, -(2**63) - 1)]
    + [("logprobs", value) for value in (-1, MAX_LOGPROBS + 1)]
    + [("prompt_logprobs", value) for value in (-1, MAX_LOGPROBS + 1)]
    + [
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
    ]
    + [("stop", ["x"] * 65), ("stop_token_ids", [-1]), ("logit_bias", {-1: 0.0})]
    + [("logit_bias", {0: NAN}), ("logit_bias", {0: 101})],
)
def test_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert ";" in message or "leave it out" in message, f"no remedy in {message!r}"


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize(
    "name", ["n", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "logit_bias"]
)
def test_refuses_integers_that_no_float_holds(name, digits):
    value = 10**digits
    with pytest.raises(ValueError, match=rf"^{name}.*=\(a number of \d+ bits\): must be"):
        SamplingParams(**{name: {0: value} if name == "logit_bias" else value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 1.5),
        ("n", "2"),
        ("seed", 1.0),
        ("stop", 3),
        ("stop", [3]),
        ("stop", b"x"),
        ("stop_token_ids", 5),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("logit_bias", [1]),
        ("logit_bias", {"x": 1}),
        ("top_p", None),
        ("logit_bias", {1: "much"}),
        ("ignore_eos", 1),
        ("logprobs", True),
        ("max_tokens", 1e3),
    ],
)
def test_refuses_values_of_the_wrong_kind(name, value):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0.001, "top_p": 1e-6, "top_k": -1, "min_p": 1},
        {"max_tokens": None, "min_tokens": 1000},
        {"seed": 2**64 - 1, "logprobs": 0, "prompt_logprobs": 20},
        {"repetition_penalty": 0.01, "n": 128, "presence_penalty": -2, "frequency_penalty": 2},
    ],
)
def test_takes_values_at_the_limits(values):
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


def test_keeps_sequences_in_one_form():
    params = SamplingParams(
        stop="END", stop_token_ids=np.array([3, 4]).tolist(), logit_bias={"7": 1, np.int64(8): 2.5}
    )
    assert params.stop == params.stop_strings == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 1.0, 8: 2.5}
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_is_a_value():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, stop=["x"])
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params
    assert hash(copy) == hash(params)
    assert dataclasses.replace(params, n=3).logit_bias == {1: 2.0}


def test_from_dict():
    assert SamplingParams.from_dict({"top_k": 3}) == SamplingParams(top_k=3)
    with pytest.raises(ValueError, match="unknown sampling parameter 'topk'; did you mean 'top_k'"):
        SamplingParams.from_dict({"topk": 3})
    with pytest.raises(ValueError, match=r"'zzzz'; known: n, temperature, .*"):
        SamplingParams.from_dict({"zzzz": 3})
    with pytest.raises(ValueError, match="top_p=2: must be a number from 1e-09 to 1;"):
        SamplingParams.from_dict({"top_p": 2})


def test_greedy():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, False),
        ({"top_k": 5, "top_p": 0.5, "seed": 1, "logit_bias": {}}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {1: 1}}, True),
        ({"min_tokens": 1}, True),
    ],
)
def test_needs_state(values, needed):
    assert SamplingParams(**values).needs_state is needed


def test_noise_seeds_differ_by_seed_and_index():
    seeds = {SamplingParams(seed=seed).noise_seed(i) for seed in range(50) for i in range(50)}
    assert len(seeds) == 2500
    assert SamplingParams(seed=7).noise_seed(0) == 7
    for seed in (-1, -(2**63), 2**64 - 1, 2**32):
        assert 0 <= SamplingParams(seed=seed).noise_seed(3) < 2**32
    with pytest.raises(ValueError, match="needs a seed"):
        SamplingParams().noise_seed(0)


def test_does_not_import_jax():
    source = (
        "import sys, ellm_jax.sampling, ellm_jax.outputs, ellm_jax.tokenizer; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", source], check=False).returncode == 0


def test_metrics_are_none_until_known_then_milliseconds():
    metrics = RequestMetrics(arrival_s=10.0)
    assert (metrics.ttft_ms, metrics.tpot_ms, metrics.e2e_ms) == (None, None, None)
    metrics = RequestMetrics(arrival_s=10.0, first_token_s=10.5, finished_s=12.5, output_tokens=5)
    assert (metrics.ttft_ms, metrics.tpot_ms, metrics.e2e_ms) == (500.0, 500.0, 2500.0)
    assert dataclasses.replace(metrics, output_tokens=1).tpot_ms is None


def test_request_output_stands_for_its_first_completion():
    outputs = (CompletionOutput(0, "a", (1, 2), "stop"), CompletionOutput(1, "b", (3,), "length"))
    output = RequestOutput("r", "p", (9,), outputs, True, RequestMetrics(0.0))
    assert (output.text, output.token_ids) == ("a", (1, 2))
