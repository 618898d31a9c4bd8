"""What users hand over becomes requests, or an error that names it and a remedy."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_checkpoints import make_checkpoint
from tokenized import add_tokenizer

from ellm_jax import SamplingParams
from ellm_jax.checkpoint import read_config
from ellm_jax.intake import Intake, is_single, params_per_prompt
from ellm_jax.request import Status
from ellm_jax.tokenizer import Tokenizer

_TILE_TOKENS, _CHUNK_BYTES = 16, 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intake")
    return add_tokenizer(make_checkpoint(root, "llama"), root / "model")


@pytest.fixture(scope="module")
def intake(model: Path) -> Intake:
    """Room for 256 tokens in the model, and for 4 chunks of 16 in the memory."""
    return Intake(
        model_config=read_config(model),
        tokenizer=Tokenizer.from_dir(model),
        max_model_len=256,
        room_bytes=4 * _CHUNK_BYTES + _CHUNK_BYTES // 2,
        tile_tokens=_TILE_TOKENS,
        chunk_bytes=_CHUNK_BYTES,
    )


def _group(intake: Intake, prompt: Any, params: Any = None) -> Any:
    return intake.group(prompt, params or SamplingParams(), "a", 0.0)


_MESSAGE = {"role": "user", "content": "w5"}


@pytest.mark.parametrize(
    ("prompts", "single"),
    [
        ("text", True),
        ([1, 2], True),
        ((1, 2), True),
        (np.array([1, 2]), True),
        ([_MESSAGE], True),
        (["a", "b"], False),
        ([[1], [2]], False),
        (np.array([[1, 2]]), False),
        ([[_MESSAGE]], False),
        ([], False),
        # No prompts at all; refused as one, by name.
        (5, True),
        (None, True),
        (_MESSAGE, True),
        (b"text", True),
        (iter([1]), True),
        ({1, 2}, True),
        ([1.5], True),
        (np.array(5), True),
    ],
)
def test_one_prompt_is_told_from_several(prompts: Any, single: bool) -> None:
    assert is_single(prompts) is single


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (_MESSAGE, r"one chat message \(a dict\).*put it into a list"),
        ({"text": "w5"}, "a prompt of type dict; give a text"),
        (5, "a prompt of type int; give a text"),
        (None, "a prompt of type NoneType"),
        (b"w5", "a prompt of type bytes"),
        ({1, 2}, "a prompt of type set"),
        (np.array(5), "a prompt of type int"),
        ([1.5], "1.5 among its token ids; give whole numbers"),
        ([True], "True among its token ids"),
    ],
)
def test_what_is_no_prompt_is_named(intake: Intake, prompt: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        _group(intake, prompt)


@pytest.mark.parametrize("prompt", ["w5 \ud83d", [{"role": "user", "content": "w5 \ud83d"}]])
def test_half_a_surrogate_pair_is_no_text(intake: Intake, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"U\+D83D at character \d+.*take it out"):
        _group(intake, prompt)


def test_parameters_must_be_parameters(intake: Intake) -> None:
    for given in ({"temperature": 0}, [{"temperature": 0}]):
        with pytest.raises(TypeError, match=r"type dict; write SamplingParams\.from_dict"):
            params_per_prompt(given, 1)
    with pytest.raises(TypeError, match=r"type dict; write SamplingParams\.from_dict"):
        _group(intake, "w5", {"temperature": 0})
    with pytest.raises(TypeError, match=r"type str; give SamplingParams"):
        params_per_prompt("hot", 3)
    with pytest.raises(ValueError, match="2 sampling parameters for 3 prompts"):
        params_per_prompt([SamplingParams()] * 2, 3)
    one, two = SamplingParams(), SamplingParams(temperature=0)
    assert params_per_prompt(None, 2) == [one, one]
    assert params_per_prompt(two, 2) == [two, two]
    assert params_per_prompt((one, two), 2) == [one, two]
    assert params_per_prompt([], 0) == []


@pytest.mark.parametrize("prompt_tokens", [1, 10, 63, 64])
def test_without_max_tokens_an_answer_gets_what_memory_holds(
    intake: Intake, prompt_tokens: int
) -> None:
    group = _group(intake, [5] * prompt_tokens, SamplingParams(max_tokens=None, min_tokens=200))
    (request,) = group.requests
    assert request.max_total_tokens == 4 * _TILE_TOKENS
    assert request.params.min_tokens == request.max_tokens


def test_what_memory_cannot_hold_is_refused(intake: Intake) -> None:
    fits = SamplingParams(max_tokens=55)
    assert _group(intake, [5] * 10, fits).requests[0].max_tokens == 55
    with pytest.raises(ValueError, match=r"up to 56 new ones .*20\.00 KiB.*lower max_tokens"):
        _group(intake, [5] * 10, SamplingParams(max_tokens=56))
    for params in (SamplingParams(max_tokens=None), SamplingParams(max_tokens=1)):
        with pytest.raises(ValueError, match=r"a prompt of 65 tokens .*shorten the prompt"):
            _group(intake, [5] * 65, params)


def test_the_context_bounds_an_answer(intake: Intake) -> None:
    roomy = dataclasses.replace(intake, room_bytes=1000 * _CHUNK_BYTES)
    for asked in (None, 300):
        request = _group(roomy, [5] * 10, SamplingParams(max_tokens=asked)).requests[0]
        assert request.max_tokens == 246


def test_an_output_that_says_finished_has_every_token(intake: Intake) -> None:
    group = _group(intake, [5], SamplingParams(max_tokens=2))
    (request,) = group.requests

    class EndsWhileRead(list[int]):
        """The engine's thread takes the last token just after a reader has copied the others."""

        def __iter__(self) -> Iterator[int]:
            yield from list(super().__iter__())
            if len(self) < 2:
                self.append(8)
                request.status = Status.FINISHED

    request.output_ids = EndsWhileRead([7])
    first, second = group.output(), group.output()
    assert (first.token_ids, first.finished) == ((7,), False)
    assert (second.token_ids, second.finished) == ((7, 8), True)
