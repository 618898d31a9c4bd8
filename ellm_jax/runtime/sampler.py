"""Chooses the next token of every row of a step, inside the jitted step.

What a row gets depends on that row alone, bit for bit: not on the other rows, nor on how many
there are. Four habits keep it so. Sums over the vocabulary are sums of integers, which have one
result in any order; a float sum has not, and XLA picks its order by the shape of the batch.
Thresholds are found by bisection on the ordered bit pattern of the logits, hence without error
and without a sort. The noise of a row comes from its seed and position only. And on a CPU rows
run one after the other: in a loop over a whole batch, XLA's vector code and the scalar code for
what is left over round an exponential differently, so that a row's place would matter.

Work that no row asks for is skipped for the batch as a whole; where one row asks for it, the
others go through it with values that change nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax.sampling import SamplingParams

VOCAB_MAX = 2**19 - 1
"""Largest vocabulary for which the integer sums below cannot overflow."""

_IN_PROMPT = 1
_STOP = 2
_COUNT_SHIFT = 2
_COUNT_ONE = 1 << _COUNT_SHIFT

_LIMB_BITS = 13  # VOCAB_MAX * 2**13 < 2**32: a limb is at most 2**13, and u32 holds their sum.
_LIMBS = 3
_KEY_OF_MINUS_INF = -0x7F800001
_SIGN_SHIFT = 31
_VALUE_BITS = 0x7FFFFFFF
_MASK_BITS = 32


class SamplerState(NamedTuple):
    """What sampling remembers per request and token. Row 0 is all zeros and never written.

    Attributes:
        words: i32[P, V]. Bit 0: the token occurs in the prompt. Bit 1: it is a stop token,
            impossible until ``min_tokens`` is reached. From bit 2: times generated.
        bias: f32[P, V], added to the logits.
    """

    words: jax.Array
    bias: jax.Array


class SamplingInputs(NamedTuple):
    """How to sample each row of a step. All arrays are [S].

    Attributes:
        temperature: f32; 0 takes the likeliest token.
        top_k: i32; 0 or below is off.
        top_p: f32 in (0, 1]; 1 is off.
        min_p: f32 in [0, 1]; 0 is off.
        repetition: f32 above 0; 1 is off.
        presence: f32; 0 is off.
        frequency: f32; 0 is off.
        seed: u32; with ``position`` the only source of the row's noise.
        position: i32, index of the token among the request's output.
        row: i32, the request's row of the state; 0 for none. No two rows of a step share one.
        suppress_stop: i32; 1 while ``min_tokens`` is not reached.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    position: jax.Array
    row: jax.Array
    suppress_stop: jax.Array


class Logprobs(NamedTuple):
    """Log probabilities of S rows, from logits before any filter.

    Attributes:
        chosen: f32[S], of the given token.
        rank: i32[S], 1 + the number of likelier tokens.
        top_ids: i32[S, N], likeliest first; of equal ones the lower id first.
        top: f32[S, N], theirs.
    """

    chosen: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top: jax.Array


def neutral_inputs(rows: int) -> SamplingInputs:
    """Host arrays for ``rows`` greedy rows with everything off: padding, and where to start."""
    i32, u32, f32 = np.int32, np.uint32, np.float32
    start: dict[str, tuple[float, Any]] = {
        "temperature": (0, f32),
        "top_k": (0, i32),
        "top_p": (1, f32),
        "min_p": (0, f32),
        "repetition": (1, f32),
        "presence": (0, f32),
        "frequency": (0, f32),
        "seed": (0, u32),
        "position": (0, i32),
        "row": (0, i32),
        "suppress_stop": (0, i32),
    }
    columns: dict[str, Any] = {
        name: np.full(rows, value, dtype) for name, (value, dtype) in start.items()
    }
    return SamplingInputs(**columns)


def init_state(rows: int, vocab: int) -> SamplerState:
    """A state of ``rows`` neutral rows, row 0 (never written) included."""
    return SamplerState(jnp.zeros((rows, vocab), jnp.int32), jnp.zeros((rows, vocab), jnp.float32))


def state_bytes(rows: int, vocab: int) -> int:
    """What a state of so many rows takes."""
    return rows * vocab * 8


def set_row(state: SamplerState, row: jax.Array, words: jax.Array, bias: jax.Array) -> SamplerState:
    """Replaces row ``row`` (i32 scalar, not 0) by what ``state_row`` made.

    To be jitted with ``state`` donated: it is then written in place.
    """
    return SamplerState(state.words.at[row].set(words), state.bias.at[row].set(bias))


def state_row(
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    params: SamplingParams,
    stop_ids: Sequence[int],
    vocab: int,
) -> tuple[
    np.ndarray[tuple[int], np.dtype[np.int32]], np.ndarray[tuple[int], np.dtype[np.float32]]
]:
    """The state of one request, on the host: for a new one, or one that is resumed.

    Args:
        prompt_ids: The prompt.
        output_ids: What it has generated so far.
        params: Its parameters; of these, ``logit_bias`` and ``min_tokens`` matter here.
        stop_ids: Every token that ends it, the model's end-of-text tokens included. Ids beyond
            the vocabulary are passed over: they cannot be generated.
        vocab: Size of the vocabulary.

    Returns:
        (words i32[V], bias f32[V]), as in ``SamplerState``.

    Raises:
        ValueError: a prompt, output or bias token outside the vocabulary.
    """
    prompt = _checked_tokens("prompt", prompt_ids, vocab)
    output = _checked_tokens("output", output_ids, vocab)
    words = (np.bincount(output, minlength=vocab) << _COUNT_SHIFT).astype(np.int32)
    words[prompt] |= _IN_PROMPT
    if params.min_tokens > 0:
        words[[token for token in stop_ids if 0 <= token < vocab]] |= _STOP
    bias = np.zeros(vocab, np.float32)
    if params.logit_bias:
        tokens = _checked_tokens("logit_bias", list(params.logit_bias), vocab)
        bias[tokens] = list(params.logit_bias.values())
    return words, bias


def greedy(
    logits: jax.Array, allowed: jax.Array | None = None, *, together: bool = False
) -> jax.Array:
    """The likeliest token of each row, the lowest id among equals; -1 where a logit is NaN.

    Args:
        logits: f32[S, V].
        allowed: As of ``sample``.
        together: As of ``sample``.

    Returns:
        i32[S].
    """

    def choose(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
        return _likeliest(_restrict(logits, allowed))

    tokens: jax.Array = _each_row(choose, logits, *_if_given(allowed), together=together)
    return tokens


def sample(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    allowed: jax.Array | None = None,
    *,
    together: bool = False,
) -> tuple[jax.Array, SamplerState]:
    """Chooses a token per row and counts it in the row's state.

    Order: bias, ``min_tokens``, penalties, the tokens that are allowed, temperature, min-p, top-k,
    top-p. Top-p looks at the probabilities among what min-p and top-k left. Tokens as likely as the
    last one kept are kept too.

    Args:
        logits: f32[S, V].
        inputs: See ``SamplingInputs``.
        state: Donate it to the jitted step: it is then updated in place.
        allowed: i32[S, ceil(V / 32)]: bit t % 32 of word t // 32 says whether the row may have
            token t; at least one has to be set. None: any token, and no work for it.
        together: All rows at once, and all work for each of them, as it suits a GPU: there the
            host would have to wait to find out what no row asks for. Else one row after the other,
            as it suits a CPU, and what a row does not ask for is left out.

    Returns:
        (tokens i32[S], state). A token is -1, and not counted, where a logit is NaN; in a row
        with noise also where the largest is infinite.
    """
    tokens = choose(logits, inputs, state, allowed, together=together)
    return tokens, count(tokens, inputs, state)


def choose(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    allowed: jax.Array | None = None,
    *,
    together: bool = False,
) -> jax.Array:
    """The tokens that ``sample`` gives, before they are counted."""
    if logits.shape[1] > VOCAB_MAX:
        raise ValueError(f"a vocabulary of {logits.shape[1]} tokens: at most {VOCAB_MAX} work")

    def choose_row(
        logits: jax.Array, inputs: SamplingInputs, allowed: jax.Array | None = None
    ) -> jax.Array:
        return _choose(logits, inputs, state, allowed, skip=not together)

    rows = (logits, inputs, *_if_given(allowed))
    tokens: jax.Array = _each_row(choose_row, *rows, together=together)
    return tokens


def count(tokens: jax.Array, inputs: SamplingInputs, state: SamplerState) -> SamplerState:
    """Counts chosen tokens (i32[S]) in the rows' state, -1 and rows without state aside."""
    # An index past the end is dropped: the neutral row stays neutral.
    counted = (inputs.row > 0) & (tokens >= 0)
    row = jnp.where(counted, inputs.row, state.words.shape[0])
    words = state.words.at[row, tokens].add(_COUNT_ONE, mode="drop")
    return state._replace(words=words)


def logprobs(
    logits: jax.Array, tokens: jax.Array, top_n: int, *, together: bool = False
) -> Logprobs:
    """Log probabilities of given tokens and of the ``top_n`` likeliest ones.

    Args:
        logits: f32[S, V], as the model gave them.
        tokens: i32[S].
        top_n: Static. Fewer than asked for come back from a smaller vocabulary.
        together: As of ``sample``.
    """
    result: Logprobs = _each_row(
        lambda logits, tokens: _logprobs(logits, tokens, top_n), logits, tokens, together=together
    )
    return result


def _each_row(function: Callable[..., Any], *rows: Any, together: bool = False) -> Any:
    """``function`` of pytrees of [S, ...] arrays; one row after the other unless ``together``.

    On a CPU a row's arrays then stay in the processor's cache and the need is that of one row.
    Whole batches took up to three times as long and eight times the logits in memory.
    """
    if together:
        return function(*rows)

    def one(row: Any) -> Any:
        alone = jax.tree.map(lambda array: array[None], row)
        return jax.tree.map(lambda array: array[0], function(*alone))

    return lax.map(one, rows)


def _if_given(array: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if array is None else (array,)


def _restrict(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Minus infinity for tokens that are not allowed (see ``sample``); f32[S, V]."""
    if allowed is None:
        return logits
    bits = (allowed[:, :, None] >> jnp.arange(_MASK_BITS)) & 1
    bits = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(bits != 0, logits, -jnp.inf)


def _likeliest(logits: jax.Array) -> jax.Array:
    # jnp.argmax carries value and index through one scalar loop on the CPU. A maximum and a
    # search for it are two vector loops, several times faster.
    vocab = logits.shape[1]
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    found = jnp.min(jnp.where(logits == _max(logits), index, vocab), axis=1)
    return jnp.where(found == vocab, -1, found)


def _choose(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    allowed: jax.Array | None = None,
    skip: bool = True,
) -> jax.Array:
    """A token per row, i32[S]; the state is only read."""
    adjusted = _for_any(inputs.row > 0, lambda: _adjust(logits, inputs, state), logits, skip)
    adjusted = _restrict(adjusted, allowed)
    noisy = inputs.temperature > 0
    nothing = jnp.zeros_like(inputs.row)
    likeliest = _for_any(~noisy, lambda: _likeliest(adjusted), nothing, skip)
    drawn = _for_any(noisy, lambda: _draw(adjusted, inputs, skip), nothing, skip)
    return jnp.where(noisy, drawn, likeliest)


def _for_any(
    wanted: jax.Array, work: Callable[[], jax.Array], otherwise: jax.Array, skip: bool
) -> jax.Array:
    """What `work` gives if any row wants it (bool[S]), else `otherwise`; without `skip` always what
    `work` gives."""
    if not skip:
        return work()
    result: jax.Array = lax.cond(jnp.any(wanted), work, lambda: otherwise)
    return result


def _logprobs(logits: jax.Array, tokens: jax.Array, top_n: int) -> Logprobs:
    largest = _max(logits)
    log_total = jnp.log(_total(jnp.exp(logits - largest)))[:, None]
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    top, top_ids = lax.top_k(logits, min(top_n, logits.shape[1]))
    return Logprobs(
        chosen=(own - largest - log_total)[:, 0],
        rank=1 + jnp.sum(logits > own, axis=1, dtype=jnp.int32),
        top_ids=top_ids,
        top=top - largest - log_total,
    )


def _adjust(logits: jax.Array, inputs: SamplingInputs, state: SamplerState) -> jax.Array:
    """Bias, ``min_tokens`` and penalties; f32[S, V]."""
    words, bias = state.words[inputs.row], state.bias[inputs.row]
    logits = logits + bias
    stopped = (words & _STOP != 0) & (inputs.suppress_stop > 0)[:, None]
    logits = jnp.where(stopped, -jnp.inf, logits)
    count = words >> _COUNT_SHIFT
    seen = (words & _IN_PROMPT != 0) | (count > 0)
    repetition = jnp.where(seen, inputs.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - inputs.frequency[:, None] * count.astype(jnp.float32)
    return logits - jnp.where(count > 0, inputs.presence[:, None], 0.0)


def _draw(logits: jax.Array, inputs: SamplingInputs, skip: bool = True) -> jax.Array:
    """One token per row by its filtered probabilities; i32[S]. Greedy rows are to be ignored."""
    # The largest of chance / Exponential(1) falls on a token with probability proportional to
    # its chance. Like Gumbel noise on the logits, with one logarithm instead of two.
    drawn = _likeliest(_kept(logits, inputs, skip) / _exponential(inputs, logits.shape[1]))
    # A comparison with NaN is false, so that such a row would have kept nothing and drawn 0.
    return jnp.where(jnp.isfinite(_max(logits))[:, 0], drawn, -1)


def _kept(logits: jax.Array, inputs: SamplingInputs, skip: bool = True) -> jax.Array:
    """Probabilities after temperature and filters, relative to the largest; f32[S, V]."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    chance = jnp.exp((logits - _max(logits)) * (1.0 / temperature)[:, None])
    key = _ordered_key(logits)
    everything = jnp.full_like(inputs.row, _KEY_OF_MINUS_INF)

    limited = (inputs.top_k > 0) & (inputs.top_k < logits.shape[1])
    least = _for_any(
        limited,
        lambda: jnp.where(limited, _top_k_key(key, inputs.top_k), everything),
        everything,
        skip,
    )
    chance = jnp.where((key >= least[:, None]) & (chance >= inputs.min_p[:, None]), chance, 0.0)
    limited = inputs.top_p < 1
    least = _for_any(
        limited,
        lambda: jnp.where(limited, _top_p_key(key, chance, inputs.top_p), everything),
        everything,
        skip,
    )
    return jnp.where(key >= least[:, None], chance, 0.0)


def _exponential(inputs: SamplingInputs, vocab: int) -> jax.Array:
    """Noise f32[S, V], exponentially distributed, from each row's seed and position."""

    def bits_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        # The generator is named: a user's choice of JAX's default one must not change answers.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.bits(key, (vocab,), jnp.uint32)

    bits = jax.vmap(bits_of)(inputs.seed, inputs.position)
    # All 32 bits count near 0, where small differences decide between many unlikely tokens.
    # The upper end stays below 1, so that the noise is finite.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return -jnp.log1p(-uniform)


def _top_k_key(key: jax.Array, k: jax.Array) -> jax.Array:
    """The key of the k-th largest element of each row; i32[S]."""

    def enough(candidate: jax.Array) -> jax.Array:
        return jnp.sum(key >= candidate[:, None], axis=1, dtype=jnp.int32) >= k

    return _largest_key(key, enough)


def _top_p_key(key: jax.Array, chance: jax.Array, p: jax.Array) -> jax.Array:
    """The least key of the smallest set of tokens that holds a share ``p``; i32[S]."""
    # Shares of 2**31, in whole numbers: rounding cannot carry their sum past 2**32.
    weight = jnp.round(chance * (2.0**31 / _total(chance))[:, None]).astype(jnp.uint32)
    total = jnp.sum(weight, axis=1, dtype=jnp.uint32)
    wanted = jnp.maximum((p * total.astype(jnp.float32)).astype(jnp.uint32), 1)

    def enough(candidate: jax.Array) -> jax.Array:
        inside = jnp.where(key >= candidate[:, None], weight, 0)
        return jnp.sum(inside, axis=1, dtype=jnp.uint32) >= wanted

    return _largest_key(key, enough)


def _largest_key(key: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest key per row that is ``enough``; that of minus infinity if none is.

    ``enough`` takes i32[S] and gives bool[S], false from some key on.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    high = jnp.max(key, axis=1) + 1
    low = jnp.full_like(high, _KEY_OF_MINUS_INF)
    found: jax.Array = lax.fori_loop(0, 32, halve, (low, high))[0]
    return found


def _ordered_key(x: jax.Array) -> jax.Array:
    """Integers i32 in the order of the floats ``x``; both zeros get the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> _SIGN_SHIFT) & _VALUE_BITS)


def _total(x: jax.Array) -> jax.Array:
    """The sum of each row of f32[S, V] in [0, 1], the same in any order; f32[S].

    Each value is cut into whole numbers of 13 bits, 39 bits in all, and these are added.
    """
    total = jnp.zeros(x.shape[0], jnp.float32)
    for limb in range(1, _LIMBS + 1):
        x = x * 2.0**_LIMB_BITS
        whole = jnp.floor(x)
        x = x - whole
        units = jnp.sum(whole.astype(jnp.uint32), axis=1, dtype=jnp.uint32)
        total += units.astype(jnp.float32) * 2.0 ** (-_LIMB_BITS * limb)
    return total


def _max(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=1, keepdims=True)


def _checked_tokens(
    what: str, tokens: Sequence[int], vocab: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    array = np.asarray(tokens, np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab)]
    if outside.size:
        raise ValueError(f"{what} token {outside[0]}: the vocabulary has ids from 0 to {vocab - 1}")
    return array
