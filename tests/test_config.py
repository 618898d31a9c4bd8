"""EngineConfig refuses what makes no sense, and says what would."""

from pathlib import Path
from typing import Any

import pytest

from ellm_jax.config import EngineConfig, parse_bytes

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("device_memory", 0, "at least 1 byte"),
        ("device_memory", "0", "at least 1 byte"),
        ("device_memory", "0.1", "at least 1 byte"),
        ("device_memory", -1, "below 0"),
        ("device_memory", "lots", "no size"),
        ("device_memory", 2**61, "above 1 EiB"),
        ("device_memory", "9" * 400 + "GiB", "above 1 EiB"),
        ("dtype", "int8", "float32 or bfloat16"),
        ("quantization", "int9", "there is int8"),
        ("kv_dtype", "int4", "there are auto, int8; leave it out for auto"),
        ("kv_dtype", None, "there are auto, int8"),
        ("max_model_len", 0, "at least 1"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_seqs", 4097, "at most 4096"),
        ("max_batch_tokens", 65537, "at most 65536"),
        ("idle_trim_s", -1, "from 0"),
        ("idle_trim_s", NAN, "None for never"),
        ("idle_trim_s", INF, "None for never"),
        ("idle_trim_s", 10**400, "None for never"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_memory", 1e9),
        ("device_memory", True),
        ("device_memory", b"1GiB"),
        ("max_model_len", 1.5),
        ("max_num_seqs", "4"),
        ("max_num_seqs", True),
        ("max_num_seqs", None),
        ("max_batch_tokens", 2.0),
        ("idle_trim_s", "1"),
        ("idle_trim_s", True),
        ("warm_up", 1),
        ("progress", "no"),
        ("compilation_cache", Path("x")),
    ],
)
def test_values_of_the_wrong_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"whole number|a number|True or False|str|no size"):
        EngineConfig(**{name: value})


def test_values_at_the_limits_are_taken() -> None:
    config = EngineConfig(
        device_memory="1", idle_trim_s=None, max_num_seqs=4096, max_batch_tokens=65536
    )
    assert config.device_memory_bytes == 1
    assert config.idle_trim_s is None
    assert EngineConfig(idle_trim_s=0).idle_trim_s == 0
    assert EngineConfig().device_memory_bytes is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), (" 1.5 gib ", 3 * 2**29), (".5K", 500), (7, 7)],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count
