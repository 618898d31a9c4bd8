"""What the memory would hold, so that a mistake in moving it is seen and not only counted.

For each token of a request one number stands for its K and V: it depends on the salt, on the token
and on all tokens before it, as K and V do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ellm_jax._native import KvCache
from ellm_jax.request import Request

GARBAGE = -1


def sampled_token(seed: int, index: int, vocab_size: int) -> int:
    """The token that a request's `index`-th sampling gives, whatever happens to it meanwhile."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) % 2**64
    return (mixed >> 32) % vocab_size


class Contents:
    """The numbers in each chunk of the device and each block of the host.

    What a step reads is looked at when the step ends: if memory was taken from under it, that is
    seen.
    """

    def __init__(self, kv: KvCache, vocab_size: int):
        """Takes the slots, and the vocabulary that sampled tokens are from."""
        self._kv = kv
        self._vocab_size = vocab_size
        self._tile = kv.layout.tile_tokens
        self._chunks: dict[int, list[int]] = {}
        self._blocks: dict[int, list[int]] = {}
        self._chains: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def chain(self, request: Request, tokens: int) -> list[int]:
        """The numbers of a request's first `tokens` tokens, or of more."""
        chain = self._chains.get(request)
        if chain is None:
            digest = hashlib.sha256(request.salt).digest()
            chain = self._chains[request] = [int.from_bytes(digest[:7], "little")]
        prompt = request.prompt_ids
        while len(chain) <= tokens:
            at = len(chain) - 1
            token = (
                prompt[at]
                if at < len(prompt)
                else sampled_token(request.seed, at - len(prompt), self._vocab_size)
            )
            chain.append(hash((chain[-1], token)))
        return chain

    def compute(self, request: Request, slot: int, begin: int, count: int, good: bool) -> None:
        """A step reads a request's first `begin` tokens and writes `count` behind them, garbage
        unless it is a good one.

        Raises:
            AssertionError: what it would read is not what was computed, or not mapped.
        """
        tile, end = self._tile, begin + count
        ids = self._kv.slot_chunks(slot, 0, -(-end // tile))
        chain = self.chain(request, end)[1:]
        for index, chunk in enumerate(ids):
            first = index * tile
            held = self._chunks.setdefault(chunk, [0] * tile)
            known = min(begin - first, tile)
            if known > 0:
                assert held[:known] == chain[first : first + known], (
                    f"{request.id}: tile {index} of slot {slot} (chunk {chunk}) holds something "
                    f"else than its first {known} tokens"
                )
            written, last = max(0, known), min(end - first, tile)
            if written < last:
                new = chain[first + written : first + last]
                held[written:last] = new if good else [GARBAGE] * len(new)

    def slot_state(self, slot: int) -> str:
        """As of the native cache: "active", "broken", ..."""
        return self._kv.slot_state(slot)

    def read(self, slot: int, first_tile: int, count: int) -> list[tuple[int, list[int]]]:
        """Chunk and numbers of some tiles of a slot."""
        ids = self._kv.slot_chunks(slot, first_tile, first_tile + count)
        return [(chunk, list(self._chunks.get(chunk, [0] * self._tile))) for chunk in ids]

    def store(self, blocks: Sequence[int], tiles: Sequence[Sequence[int]]) -> None:
        """Writes tiles to host blocks."""
        self._blocks.update((b, list(t)) for b, t in zip(blocks, tiles, strict=True))

    def load(self, slot: int, first_tile: int, blocks: Sequence[int], good: bool) -> None:
        """Writes host blocks to tiles of a slot, or garbage."""
        ids = self._kv.slot_chunks(slot, first_tile, first_tile + len(blocks))
        for chunk, block in zip(ids, blocks, strict=True):
            self._chunks[chunk] = list(self._blocks[block]) if good else [GARBAGE] * self._tile
