"""Train the tiny model from nothing: corpus, tokenizer, weights.

    python scripts/tiny_model/train.py --minutes 40 --out ellm_jax/tiny

With --steps the same seed gives the same model on the same machine; with --minutes the number of
steps follows from how fast the first ones were.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoint import load_model, model_config, save_model
from corpus import Corpus
from flax import nnx
from initial import with_copying_heads
from optax.contrib import MuonDimensionNumbers, muon
from tokenizer import encode_documents, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from tqdm import tqdm

from ellm_jax.models import param_shapes
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.xla_ops import XlaOps

Params = dict[str, jax.Array]
_TOKENIZER_DOCUMENTS = 20_000
_DOCUMENTS_PER_FILL = 200
_TIMED_STEPS = 20


class TrainingOps(XlaOps):
    """Attention is computed again on the way back: its scores would be most of the memory."""

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """As `XlaOps.attend`."""

        def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return XlaOps.attend(self, q, k, v, layer, window, None)[0]

        return jax.checkpoint(mixed)(q, k, v), cache


def flat_params(model: Decoder) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The model's structure, and its parameters by dotted name."""
    graph, state = nnx.split(model)
    return graph, {".".join(map(str, path)): leaf[...] for path, leaf in state.flat_state()}


def rebuild(graph: nnx.GraphDef[Decoder], params: Params) -> Decoder:
    """The opposite of `flat_params`."""
    leaves = {tuple(name.split(".")): nnx.Param(value) for name, value in params.items()}
    model: Decoder = nnx.merge(graph, nnx.State.from_flat_path(leaves))
    return model


def rows(
    corpus: Corpus, tokenizer: Tokenizer, length: int, batch: int, drills: Callable[[], float]
) -> Iterator[np.ndarray]:
    """Endless batches `u16[batch, length + 1]` of documents packed one after the other.

    `drills()` is the share of drills among the documents at the moment.
    """
    need = batch * (length + 1)
    held = np.zeros(0, np.uint16)
    while True:
        while held.size < need:
            share = drills()
            documents = [
                corpus.drill() if corpus.rng.random() < share else corpus.document()
                for _ in range(_DOCUMENTS_PER_FILL)
            ]
            held = np.concatenate([held, encode_documents(tokenizer, documents)])
        yield held[:need].reshape(batch, length + 1)
        held = held[need:]


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for the rest; the learning rate comes per step."""
    stacked = MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    dimensions = {
        name: stacked if len(shape) == 3 else None
        for name, shape in param_shapes(model_config()).items()
    }
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate=1.0,
            weight_decay=0.02,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def make_step(
    graph: nnx.GraphDef[Decoder], optimizer: optax.GradientTransformation
) -> Callable[[Params, Any, jax.Array, jax.Array], tuple[Params, Any, jax.Array]]:
    """One jitted update: parameters, optimizer state, tokens, learning rate."""

    def loss_of(params: Params, tokens: jax.Array) -> jax.Array:
        model, ops = rebuild(graph, params), TrainingOps()
        positions = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)

        def row(row_tokens: jax.Array) -> jax.Array:
            hidden, _ = model(row_tokens[:-1], positions, ops, None)
            scores = model.logits(hidden, ops)
            likelihood = jax.nn.log_softmax(scores)
            return -jnp.take_along_axis(likelihood, row_tokens[1:, None], axis=1).mean()

        return jax.vmap(row)(tokens).mean()

    def step(
        params: Params, state: Any, tokens: jax.Array, rate: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens.astype(jnp.int32))
        updates, state = optimizer.update(gradients, state, params)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def schedule(done: float, peak: float) -> float:
    """Learning rate at a fraction of the run: warm up, hold, and fall to nothing."""
    return peak * min(1.0, done / 0.02 + 0.01, (1.0 - done) / 0.5 + 0.005)


def drill_share(done: float, first: float) -> float:
    """Many of the documents at first, none after a third of the run."""
    return first * min(1.0, max(0.0, (0.33 - done) / 0.25))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model that comes with ellm_jax.")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--minutes", type=float, default=40.0, help="wall time of the training")
    how_long.add_argument("--steps", type=int, help="number of updates instead of a time")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--start", type=Path, help="directory of a model to train further")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=288, help="tokens per row")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--drills", type=float, default=0.5, help="share of drills at first")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, nnx.GraphDef[Decoder], Params]:
    """Tokenizer, structure and starting weights: new ones, or those of --start."""
    config = model_config()
    graph, params = flat_params(Decoder(config, rngs=nnx.Rngs(args.seed)))
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        return tokenizer, graph, load_model(args.start)
    sample = Corpus(args.seed + 1)
    texts = (sample.document() for _ in range(_TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return tokenizer, graph, with_copying_heads(params, config, args.seed)


def train(
    args: argparse.Namespace, tokenizer: Tokenizer, graph: nnx.GraphDef[Decoder], params: Params
) -> Params:
    """Run the updates and save now and then; returns the trained parameters."""
    optimizer = make_optimizer()
    state = optimizer.init(params)
    step = make_step(graph, optimizer)
    # Without --steps the total is an estimate, made anew every few steps.
    total, done = args.steps or _TIMED_STEPS * 50, 0
    batches = rows(
        Corpus(args.seed),
        tokenizer,
        args.length,
        args.batch,
        drills=lambda: drill_share(done / total, args.drills),
    )
    started = saved = time.monotonic()
    losses: deque[float] = deque(maxlen=50)
    with tqdm(total=total, unit="step", mininterval=5.0) as bar:
        while done < total:
            rate = schedule(done / total, args.rate)
            tokens = jnp.asarray(next(batches))
            params, state, loss = step(params, state, tokens, jnp.float32(rate))
            losses.append(float(loss))
            done += 1
            now = time.monotonic()
            if done == 1:
                started = now  # after compilation
            if not args.steps and done % _TIMED_STEPS == 0:
                left = args.minutes * 60 - (now - started)
                bar.total = total = done + max(0, int(left * (done - 1) / (now - started)))
            bar.set_postfix(loss=f"{np.mean(losses):.3f}", rate=f"{rate:.1e}", refresh=False)
            bar.update()
            if now - saved > args.save_minutes * 60:
                save_model(params, args.out)
                saved = now
    print(f"{done} steps, loss of the last {len(losses)}: {np.mean(losses):.4f}")
    return params


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, graph, params = prepare(args)
    print(f"{sum(p.size for p in params.values()) / 1e6:.2f} M parameters", flush=True)
    save_tokenizer(tokenizer, args.out, model_config().max_context)
    save_model(train(args, tokenizer, graph, params), args.out)


if __name__ == "__main__":
    main()
