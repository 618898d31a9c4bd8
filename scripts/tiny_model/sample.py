"""Read what a trained model writes: python scripts/tiny_model/sample.py --model ellm_jax/tiny

Each prompt is continued greedily and then with --temperature. A prompt that starts with "chat:" is
sent through the chat template. Every token recomputes the whole text, so this is not fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from checkpoint import load_model, model_config
from corpus import ASSISTANT, BOS, USER
from flax import nnx
from tokenizers import Tokenizer
from train import flat_params, rebuild

from ellm_jax.models.decoder import Decoder
from ellm_jax.models.xla_ops import XlaOps

PROMPTS = (
    "Once upon a time",
    "The little dog",
    "A girl named Lily",
    "Tom was sad because",
    "One day, a big bear",
    "It was a cold winter night",
    "The king",
    "In the middle of the sea",
    "chat:Tell me a story about a fox.",
    "chat:Tell me a story about a dragon and a girl.",
    "chat:Hello, who are you?",
    "chat:What is the capital of France?",
)


def make_scores(directory: Path) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of texts `i32[P, T]` and lengths `i32[P]`: scores of the next tokens `[P, V]`."""
    graph, _ = flat_params(Decoder(model_config(), rngs=nnx.Rngs(0)))
    model, ops = rebuild(graph, load_model(directory)), XlaOps()

    def one(tokens: jax.Array, length: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, _ = model(tokens, positions, ops, None)
        return model.logits(hidden[length - 1][None], ops)[0]

    return jax.jit(jax.vmap(one))


def generate(
    directory: Path, prompts: tuple[str, ...], max_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Continue every prompt to its end or by at most `max_tokens`; temperature 0 is greedy."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    eos = model_config().eos_token_ids[0]
    scores = make_scores(directory)
    texts = [_with_template(prompt) for prompt in prompts]
    begun = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    lengths = np.array([len(ids) for ids in begun])
    tokens = np.zeros((len(texts), int(lengths.max()) + max_tokens), np.int32)
    for row, ids in enumerate(begun):
        tokens[row, : len(ids)] = ids
    rng, running = np.random.default_rng(seed), np.ones(len(texts), bool)
    for _ in range(max_tokens):
        logits = np.asarray(scores(jnp.asarray(tokens), jnp.asarray(lengths)), np.float64)
        if temperature > 0:
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        chosen = logits.argmax(-1)
        running &= chosen != eos
        if not running.any():
            break
        rows = np.flatnonzero(running)
        tokens[rows, lengths[rows]] = chosen[rows]
        lengths[rows] += 1
    ends = zip(tokens, lengths, strict=True)
    return [tokenizer.decode(row[:length].tolist()) for row, length in ends]


def _with_template(prompt: str) -> str:
    if prompt.startswith("chat:"):
        return f"{BOS}{USER}\n{prompt.removeprefix('chat:')}\n{ASSISTANT}\n"
    return BOS + prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a trained tiny model continue some prompts.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    args = parser.parse_args()
    for temperature in (0.0, args.temperature):
        print(f"=== temperature {temperature}")
        texts = generate(args.model, tuple(args.prompts), args.max_tokens, temperature, args.seed)
        print("\n---\n".join(texts))


if __name__ == "__main__":
    main()
