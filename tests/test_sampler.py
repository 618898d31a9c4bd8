"""The jitted sampler against NumPy in float64, hand-computed cases and statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ellm_jax.runtime import sampler
from ellm_jax.runtime.sampler import SamplingInputs
from ellm_jax.sampling import SamplingParams

VOCABS = (7, 1003, 32000)


def make_inputs(rows, **columns):
    inputs = sampler.neutral_inputs(rows)
    for name, value in columns.items():
        getattr(inputs, name)[:] = value
    return inputs


def make_logits(seed, rows, vocab, spread=4.0):
    noise = np.random.default_rng(seed).standard_normal((rows, vocab))
    return (noise * spread).astype(np.float32)


def reference_kept(logits, temperature, top_k, top_p, min_p):
    """The tokens that the filters leave, and how close top-p's decision was; float64."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    keep = p >= min_p * p.max()
    if 0 < top_k < len(p):
        scaled_kept = np.where(keep, scaled, -np.inf)
        keep &= scaled >= np.sort(scaled_kept)[::-1][top_k - 1]
    margin = np.inf
    if top_p < 1:
        left = np.where(keep, p, 0)
        left /= left.sum()
        order = np.argsort(-left, kind="stable")
        reached = np.cumsum(left[order])
        margin = np.abs(reached - top_p).min()
        last = order[min(np.searchsorted(reached, top_p), len(p) - 1)]
        keep &= logits >= logits[last]
    return keep, margin


kept = jax.jit(sampler._kept)
sample = jax.jit(sampler.sample)


class TestGreedy:
    @pytest.mark.parametrize("vocab", VOCABS)
    def test_is_argmax(self, vocab):
        logits = make_logits(1, 5, vocab)
        assert jax.jit(sampler.greedy)(logits).tolist() == logits.argmax(axis=1).tolist()

    def test_takes_the_first_of_equals(self):
        logits = np.float32([[0, 3, 3, 1], [-1, -1, -1, -1], [-0.0, 0.0, -1, -1]])
        assert sampler.greedy(logits).tolist() == [1, 0, 0]

    def test_marks_a_row_with_nan_and_no_other(self):
        logits = np.float32([[0, np.nan, 1], [0, 2, 1]])
        assert sampler.greedy(logits).tolist() == [-1, 1]
        tokens, state = sampler.sample(
            logits, make_inputs(2, temperature=1, top_k=1, row=[1, 2]), sampler.init_state(3, 3)
        )
        assert tokens.tolist() == [-1, 1]
        assert np.asarray(state.words).tolist() == [[0, 0, 0], [0, 0, 0], [0, 4, 0]]


class TestFilters:
    @pytest.mark.parametrize("vocab", VOCABS)
    @pytest.mark.parametrize(
        "filters",
        [
            {"top_k": 5},
            {"top_p": 0.9},
            {"top_p": 0.001},
            {"min_p": 0.03},
            {"top_k": 40, "top_p": 0.7},
            {"top_k": 3, "top_p": 0.99, "min_p": 0.1},
        ],
        ids=str,
    )
    def test_keep_what_float64_keeps(self, vocab, filters):
        filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
        rows = 16
        logits = make_logits(vocab, rows, vocab)
        temperatures = np.linspace(0.4, 1.9, rows)
        got = np.asarray(kept(logits, make_inputs(rows, temperature=temperatures, **filters)))
        compared = 0
        for row in range(rows):
            want, margin = reference_kept(logits[row], temperatures[row], **filters)
            if margin > 1e-6:
                compared += 1
                assert ((got[row] > 0) == want).all(), (vocab, filters, row, want.sum())
        assert compared >= rows - 2

    def test_probabilities_are_those_of_the_temperature(self):
        logits = make_logits(3, 4, 501)
        temperatures = np.array([0.5, 1.0, 1.5, 3.0])
        got = np.asarray(kept(logits, make_inputs(4, temperature=temperatures)), np.float64)
        want = np.exp((logits - logits.max(1, keepdims=True)) / temperatures[:, None])
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-30)

    def test_keep_ties_at_the_threshold(self):
        logits = np.log(np.float32([[0.4, 0.2, 0.2, 0.1, 0.1]]))
        mask = partial(kept, logits)
        assert (mask(make_inputs(1, temperature=1, top_k=2)) > 0).tolist() == [[1, 1, 1, 0, 0]]
        assert (mask(make_inputs(1, temperature=1, top_p=0.5)) > 0).tolist() == [[1, 1, 1, 0, 0]]

    def test_top_p_counts_what_top_k_left(self):
        # Of 0.4 and 0.3 alone, the first holds 4/7 > 0.55; of all four it would not.
        logits = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
        both = make_inputs(1, temperature=1, top_k=2, top_p=0.55)
        assert (kept(logits, both) > 0).tolist() == [[1, 0, 0, 0]]
        alone = make_inputs(1, temperature=1, top_p=0.55)
        assert (kept(logits, alone) > 0).tolist() == [[1, 1, 0, 0]]

    @pytest.mark.parametrize("off", [0, -1, 7, 100])
    def test_top_k_off_or_all(self, off):
        assert (kept(make_logits(0, 1, 7), make_inputs(1, temperature=1, top_k=off)) > 0).all()

    def test_extreme_logits(self):
        logits = np.float32([[3e38, -3e38, 0, -np.inf], [1e-40, 0, -1e-40, -np.inf]])
        inputs = make_inputs(2, temperature=0.001, top_k=2, top_p=0.5, min_p=0.5)
        got = np.asarray(kept(logits, inputs)) > 0
        assert got[0].tolist() == [True, False, False, False]
        assert got[1, 0]
        assert not got[1, 3]

    def test_top_p_sees_a_tail_of_many_unlikely_tokens(self):
        # Half of the mass in one token, half spread over 99,999: each tiny, together not.
        vocab = 100_000
        logits = np.zeros((1, vocab), np.float32)
        logits[0, 7] = np.log(vocab - 1)
        logits[0, 8] = 1e-3
        assert (kept(logits, make_inputs(1, temperature=1, top_p=0.49)) > 0).sum() == 1
        assert (kept(logits, make_inputs(1, temperature=1, top_p=0.52)) > 0).sum() == vocab


class TestDistribution:
    @pytest.mark.parametrize(
        "columns",
        [
            {"temperature": 1.0},
            {"temperature": 0.6},
            {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.01},
        ],
        ids=str,
    )
    def test_chi_square(self, columns):
        vocab, draws = 40, 20_000
        logits = make_logits(11, 1, vocab, spread=1.0)
        inputs = make_inputs(draws, seed=np.arange(draws), **columns)
        tokens, _ = sample(np.tile(logits, (draws, 1)), inputs, sampler.init_state(1, vocab))
        p = np.asarray(kept(logits, make_inputs(1, **columns)), np.float64)[0]
        expected = p / p.sum() * draws
        counts = np.bincount(np.asarray(tokens), minlength=vocab)
        assert (counts[expected == 0] == 0).all()
        usable = expected >= 5
        statistic = ((counts - expected)[usable] ** 2 / expected[usable]).sum()
        freedom = usable.sum() - 1
        # Some five standard deviations; seeds are fixed, so this is not flaky.
        assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)

    def test_positions_are_independent(self):
        vocab, draws = 8, 16_000
        inputs = make_inputs(draws, temperature=1, seed=5, position=np.arange(draws))
        tokens, _ = sample(np.zeros((draws, vocab), np.float32), inputs, sampler.init_state(1, 8))
        tokens = np.asarray(tokens)
        pairs = np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2)
        expected = (draws - 1) / vocab**2
        statistic = ((pairs - expected) ** 2 / expected).sum()
        assert statistic < 63 + 5 * np.sqrt(2 * 63), statistic

    def test_noise_is_that_of_seed_and_position(self):
        logits = make_logits(2, 1, 5000, spread=0.1)
        state = sampler.init_state(1, 5000)

        def token(seed, position):
            inputs = make_inputs(1, temperature=1, seed=seed, position=position)
            return int(sample(logits, inputs, state)[0][0])

        assert token(1, 2) == token(1, 2)
        assert len({token(1, 2), token(2, 1), token(1, 3), token(2**32 - 1, 2)}) == 4


class TestPenalties:
    def test_by_hand(self):
        params = SamplingParams(logit_bias={3: 1.5}, min_tokens=2)
        words, bias = sampler.state_row([0, 1, 1], [1, 2, 2], params, [4, 99], 6)
        assert words.tolist() == [1, 1 + 4, 8, 0, 2, 0]
        assert bias.tolist() == [0, 0, 0, 1.5, 0, 0]
        state = sampler.set_row(sampler.init_state(2, 6), jnp.int32(1), words, bias)
        logits = np.float32([[2.0, -1.0, 4.0, 0.5, 9.0, 1.0]])
        inputs = make_inputs(
            1, repetition=2.0, presence=0.25, frequency=0.5, row=1, suppress_stop=1
        )
        # Token 0: prompt only, 2 / 2. Token 1: -1 * 2 - 0.5 - 0.25. Token 2: 4 / 2 - 1 - 0.25.
        want = [1.0, -2.75, 0.75, 2.0, -np.inf, 1.0]
        assert sampler._adjust(logits, inputs, state)[0].tolist() == want
        inputs.suppress_stop[:] = 0
        want[4] = 9.0
        assert sampler._adjust(logits, inputs, state)[0].tolist() == want

    def test_greedy_rows_see_them(self):
        words, bias = sampler.state_row([0], [], SamplingParams(repetition_penalty=3), [], 3)
        state = sampler.set_row(sampler.init_state(2, 3), jnp.int32(1), words, bias)
        logits = np.float32([[3, 2, 1], [3, 2, 1]])
        tokens, after = sample(logits, make_inputs(2, repetition=3, row=[1, 0]), state)
        assert tokens.tolist() == [1, 0]
        assert np.asarray(after.words).tolist() == [[0, 0, 0], [1, 4, 0]]

    def test_counting_goes_on_as_state_row_would(self):
        vocab, steps = 50, 30
        params = SamplingParams(frequency_penalty=0.3)
        words, bias = sampler.state_row([3, 4], [], params, [], vocab)
        state = sampler.set_row(sampler.init_state(3, vocab), jnp.int32(2), words, bias)
        output = []
        for step in range(steps):
            inputs = make_inputs(1, temperature=1, frequency=0.3, row=2, position=step, seed=9)
            tokens, state = sample(make_logits(step, 1, vocab, 1.0), inputs, state)
            output.append(int(tokens[0]))
        want, _ = sampler.state_row([3, 4], output, params, [], vocab)
        assert np.asarray(state.words)[2].tolist() == want.tolist()
        assert not np.asarray(state.words)[:2].any()

    def test_min_tokens_makes_stop_tokens_impossible(self):
        params = SamplingParams(min_tokens=1)
        words, bias = sampler.state_row([1], [], params, [0], 3)
        state = sampler.set_row(sampler.init_state(2, 3), jnp.int32(1), words, bias)
        logits = np.tile(np.float32([[20, 0, 0]]), (64, 1))
        for suppress, possible in ((1, {1, 2}), (0, {0})):
            drawn = set()
            for seed in range(16):
                inputs = make_inputs(1, temperature=1, seed=seed, row=1, suppress_stop=suppress)
                drawn.add(int(sample(logits[:1], inputs, state)[0][0]))
            assert drawn <= possible

    @pytest.mark.parametrize(
        ("prompt", "output", "bias", "what"),
        [
            ([9], [], None, "prompt token 9"),
            ([], [-1], None, "output token -1"),
            ([], [], {4: 1.0}, "logit_bias token 4"),
        ],
    )
    def test_refuses_tokens_outside_the_vocabulary(self, prompt, output, bias, what):
        with pytest.raises(ValueError, match=f"{what}: the vocabulary has ids from 0 to 3"):
            sampler.state_row(prompt, output, SamplingParams(logit_bias=bias), [], 4)


def varied_inputs(rows):
    """Rows that use different features, with state in every second one."""
    index = np.arange(rows)
    return make_inputs(
        rows,
        temperature=np.where(index % 4 == 3, 0, 0.5 + 0.17 * index),
        top_k=np.where(index % 3 == 0, 20 + index, 0),
        top_p=np.where(index % 2 == 0, 0.9 - 0.01 * index, 1),
        min_p=np.where(index % 5 == 0, 0.02, 0),
        repetition=1 + 0.1 * (index % 3),
        presence=0.1 * (index % 2),
        frequency=0.21 * (index % 3),
        seed=1000 + index,
        position=7 * index,
        row=np.where(index % 2 == 1, index + 1, 0),
        suppress_stop=index % 2,
    )


@pytest.mark.parametrize("vocab", [1003, 32000])
class TestRowsAreIndependent:
    """Same row, same bits, whatever else is in the batch and wherever it stands."""

    rows = 8

    def setup(self, vocab):
        logits = make_logits(77, self.rows, vocab, spread=2.0)
        state = sampler.init_state(self.rows + 1, vocab)
        for row in range(1, self.rows + 1):
            params = SamplingParams(logit_bias={row % vocab: 0.3}, min_tokens=3)
            rng = np.random.default_rng(row)
            words = sampler.state_row(
                rng.integers(vocab, size=30), rng.integers(vocab, size=20), params, [2], vocab
            )
            state = sampler.set_row(state, jnp.int32(row), *words)
        return logits, state, varied_inputs(self.rows)

    def batches(self):
        """Every row alone, all of them in three orders, and some with a neighbour."""
        rng = np.random.default_rng(5)
        alone = [np.array([row]) for row in range(self.rows)]
        orders = [np.arange(self.rows), np.arange(self.rows)[::-1], rng.permutation(self.rows)]
        return alone + orders + [np.array([3, 6]), np.array([5, 0, 2])]

    def check(self, function, vocab):
        logits, state, inputs = self.setup(vocab)
        compiled = jax.jit(function)
        seen = {}
        for batch in self.batches():
            rows = SamplingInputs(*(column[batch] for column in inputs))
            results = jax.tree.leaves(compiled(logits[batch], rows, state))
            for place, row in enumerate(batch):
                bits = [np.asarray(result)[place].tobytes() for result in results]
                assert seen.setdefault(row, bits) == bits, (vocab, row, batch)

    def test_tokens(self, vocab):
        self.check(lambda logits, inputs, state: sampler.sample(logits, inputs, state)[0], vocab)

    def test_adjusted_logits(self, vocab):
        self.check(
            lambda logits, inputs, state: sampler._each_row(
                lambda logits, inputs: sampler._adjust(logits, inputs, state), logits, inputs
            ),
            vocab,
        )

    def test_kept_probabilities(self, vocab):
        self.check(
            lambda logits, inputs, state: sampler._each_row(sampler._kept, logits, inputs), vocab
        )

    def test_noise(self, vocab):
        self.check(
            lambda logits, inputs, state: sampler._each_row(
                lambda inputs: sampler._exponential(inputs, vocab), inputs
            ),
            vocab,
        )

    def test_logprobs(self, vocab):
        self.check(
            lambda logits, inputs, state: sampler.logprobs(logits, inputs.position % vocab, 20),
            vocab,
        )

    def test_the_path_for_other_devices_gives_the_same_tokens(self, vocab):
        logits, state, inputs = self.setup(vocab)
        batched = jax.jit(sampler._choose)(logits, inputs, state)
        assert sample(logits, inputs, state)[0].tolist() == batched.tolist()


class TestLogprobs:
    @pytest.mark.parametrize("vocab", VOCABS)
    @pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
    def test_against_float64(self, vocab, spread):
        logits = make_logits(vocab, 6, vocab, spread)
        tokens = np.random.default_rng(1).integers(vocab, size=6).astype(np.int32)
        got = jax.jit(sampler.logprobs, static_argnums=2)(logits, tokens, 5)
        wide = logits.astype(np.float64)
        top = wide.max(axis=1, keepdims=True)
        want = wide - top - np.log(np.exp(wide - top).sum(axis=1, keepdims=True))
        own = np.take_along_axis(want, tokens[:, None], axis=1)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        np.testing.assert_allclose(got.chosen, own[:, 0], rtol=2e-6, atol=2e-6)
        assert (
            got.rank.tolist() == (1 + (logits > logits[range(6), tokens][:, None]).sum(1)).tolist()
        )
        assert got.top_ids.tolist() == order.tolist()
        want_top = np.take_along_axis(want, order, axis=1)
        np.testing.assert_allclose(got.top, want_top, rtol=2e-6, atol=2e-6)

    def test_ties_share_the_better_rank_and_the_lower_id_leads(self):
        got = sampler.logprobs(np.float32([[1, 2, 2, 0]]), np.int32([2]), 20)
        assert got.rank.tolist() == [1]
        assert got.top_ids.tolist() == [[1, 2, 0, 3]]

    def test_a_long_tail_counts(self):
        logits = np.full((1, 200_000), -20.5, np.float32)
        logits[0, 0] = 0
        got = sampler.logprobs(logits, np.int32([0]), 1)
        want = -np.log1p(199_999 * np.exp(-20.5))
        np.testing.assert_allclose(got.chosen, [want], rtol=1e-3)


class TestCompiled:
    def test_state_is_updated_in_place(self):
        rows, vocab = 64, 2000
        step = jax.jit(sampler.sample, donate_argnums=2)
        state = sampler.init_state(rows, vocab)
        memory = step.lower(make_logits(0, 4, vocab), varied_inputs(4), state).compile()
        analysis = memory.memory_analysis()
        assert analysis.alias_size_in_bytes == 2 * rows * vocab * 4
        assert analysis.temp_size_in_bytes < rows * vocab * 4 / 2

    def test_refuses_a_vocabulary_too_large_for_its_sums(self):
        vocab = sampler.VOCAB_MAX + 1
        shapes = jax.eval_shape(lambda: (jnp.zeros((1, vocab)), sampler.init_state(1, vocab)))
        with pytest.raises(ValueError, match=f"{vocab} tokens: at most {sampler.VOCAB_MAX}"):
            jax.eval_shape(sampler.sample, shapes[0], make_inputs(1), shapes[1])

    def test_sums_do_not_overflow_at_the_largest_vocabulary(self):
        ones = np.ones((1, sampler.VOCAB_MAX), np.float32)
        assert float(sampler._total(ones)[0]) == sampler.VOCAB_MAX
        inputs = make_inputs(1, temperature=1, top_p=0.999)
        assert (sampler._kept(ones, inputs) > 0).all()

    def test_neutral_inputs_are_greedy(self):
        logits = make_logits(0, 3, 9)
        tokens, state = sample(logits, sampler.neutral_inputs(3), sampler.init_state(2, 9))
        assert tokens.tolist() == logits.argmax(1).tolist()
        assert not np.asarray(state.words).any()
