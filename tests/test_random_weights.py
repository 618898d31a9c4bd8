"""A model of random weights needs no weights on the disk, and computes."""

import json
import math

import hf_checkpoints
import jax
import numpy as np
import pytest

from ellm_jax import SamplingParams
from ellm_jax.checkpoint import load_model, weights_bytes
from ellm_jax.models import param_shapes


@pytest.fixture
def config_only(tmp_path):
    config = hf_checkpoints.config_dict(hf_checkpoints.CASES["qwen2_tied"], "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_shapes_sizes_and_spread(config_only):
    told = []
    model, config = load_model(
        config_only, load_format="dummy", progress=lambda done, total: told.append((done, total))
    )
    params = model.named_params()
    assert {name: p.shape for name, p in params.items()} == param_shapes(config)
    assert sum(p.nbytes for p in params.values()) == weights_bytes(config) == told[-1][0]
    assert told[-1][0] == told[-1][1]
    for name, param in params.items():
        values = np.asarray(param, np.float32)
        if name.endswith("norm"):
            assert np.all(values == 1)
        elif name.endswith("bias"):
            assert np.all(values == 0)
        else:
            bound = math.sqrt(3 / values.shape[-1])
            assert np.abs(values).max() <= bound * 1.01
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert np.unique(values).size > 100
    layers = np.asarray(params["blocks.qkv"], np.float32)
    assert not np.array_equal(layers[0], layers[1])


def test_the_same_again_and_on_the_device_that_is_asked_for(config_only):
    device = jax.devices()[0]
    placement = jax.sharding.SingleDeviceSharding(device)
    first, _ = load_model(config_only, load_format="dummy")
    again, _ = load_model(config_only, load_format="dummy", placement=placement)
    for name, param in first.named_params().items():
        np.testing.assert_array_equal(param, again.named_params()[name])
        assert again.named_params()[name].devices() == {device}


def test_an_engine_runs_sleeps_and_wakes_with_them(config_only, make_engine):
    engine = make_engine(config_only, load_format="dummy")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    before = engine.generate([5, 6, 7], params)[0].token_ids
    assert len(before) == 8
    engine.sleep()
    engine.wake()
    assert engine.generate([5, 6, 7], params)[0].token_ids == before
