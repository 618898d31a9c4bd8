"""Finished tiles of KV, found again by what they hold: names for tiles, and who keeps them.

A tile is named by a chained SHA-256 of its tokens and all before them, so that equal names mean
equal K and V. The chain starts with a salt: tenants with different salts share nothing. A request
that finds its leading tiles here maps the same chunks into its own slot instead of computing them.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class TileKeys:
    """The names of the full tiles of one sequence.

    Attributes:
        digests: one per full tile so far.
        num_tokens: tokens taken in so far, those of the tile that is not yet full included.
    """

    def __init__(self, tile_tokens: int, salt: bytes = b""):
        """Takes the tokens per tile, and what sets this sequence's names apart from others'."""
        self._tile = struct.Struct(f"<{tile_tokens}I")
        self._tile_tokens = tile_tokens
        self._tail: list[int] = []
        self._link = hashlib.sha256(salt).digest()
        self.digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Where the tokens of the next `update` begin."""
        return len(self.digests) * self._tile_tokens + len(self._tail)

    def update(self, tokens: Sequence[int]) -> None:
        """Takes in the tokens that follow those of the last call, and names each tile they fill.

        Token ids go into the hash as 4 bytes each, little endian.
        """
        size = self._tile_tokens
        pending = [*self._tail, *tokens]
        for begin in range(0, len(pending) - size + 1, size):
            tile = self._tile.pack(*pending[begin : begin + size])
            self._link = hashlib.sha256(self._link + tile).digest()
            self.digests.append(self._link)
        self._tail = pending[len(pending) - len(pending) % size :]


@dataclass(slots=True)
class _Tile:
    chunk: int
    pins: int


class PrefixCache:
    """Which named tiles are kept, in which chunk, and which of them may be given up.

    A request pins the leading tiles that its slot shares with the cache, all of them up to some
    count; so a tile has at least the pins of every tile that continues it. Tiles that nobody pins
    stand in the order in which their last pin went, the deepest of one request first. Hence a tile
    always stands behind those that continue it, and the first in the order is the least recently
    used leaf. Every operation takes constant time per tile it is about.

    Not thread-safe: one thread plans.

    Attributes:
        hits: tiles that were held instead of computed.
        misses: tiles that requests brought in after computing them.
    """

    def __init__(
        self,
        cache: Callable[[Sequence[int]], object],
        uncache: Callable[[Sequence[int]], int],
    ):
        """Args:
        cache: takes one reference to each of these chunks, or to none and raises.
        uncache: gives those references up; returns the bytes that became free.
        """
        self._cache = cache
        self._uncache = uncache
        self._tiles: dict[bytes, _Tile] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @property
    def chunks(self) -> int:
        """Chunks that are kept, pinned or not."""
        return len(self._tiles)

    @property
    def evictable(self) -> int:
        """Chunks that `evict` can give up now."""
        return len(self._idle)

    def match(self, digests: Sequence[bytes]) -> int:
        """How many leading tiles of a sequence are here. Changes nothing."""
        for found, digest in enumerate(digests):
            if digest not in self._tiles:
                return found
        return len(digests)

    def pinned(self, digests: Sequence[bytes]) -> int:
        """How many leading tiles of these are pinned; all of them have to be here. A tile has at
        least the pins of those that continue it, so halving finds the last."""
        return bisect.bisect_left(digests, True, key=lambda digest: not self._tiles[digest].pins)

    def hold(self, digests: Sequence[bytes]) -> list[int]:
        """Pins a sequence's leading tiles; returns their chunks, for the caller to map.

        Raises:
            KeyError: one of them is not here; `match` says how many are. Nothing is pinned.
        """
        tiles = [self._tiles[digest] for digest in digests]
        for digest, tile in zip(digests, tiles, strict=True):
            self._pin(digest, tile)
        self.hits += len(tiles)
        return [tile.chunk for tile in tiles]

    def insert(self, digests: Sequence[bytes], begin: int, chunk_ids: Sequence[int]) -> int:
        """Brings in tiles that a request has computed, and pins them for it.

        Stops at a tile that is here already because somebody else computed it too: that one stays
        as it is, unpinned by this request, whose own chunk remains its own. (A pin on a chunk that
        its holder does not map would be memory that nobody can use.)

        Args:
            digests: the sequence's tiles.
            begin: how many leading ones the request pins: what `hold` took, or what this method
                returned last.
            chunk_ids: of the tiles from `begin` on, complete in memory.

        Returns:
            How many leading tiles the request pins now.

        Raises:
            ValueError: the tile before `begin` is pinned by nobody. Nothing is changed.
        """
        if begin and not self._pins(digests[begin - 1]):
            raise ValueError(f"insertion at tile {begin}, but nobody pins the one before; hold it")
        new = []
        for digest, chunk in zip(digests[begin:], chunk_ids, strict=False):
            if digest in self._tiles:
                break
            new.append((digest, chunk))
        if new:
            self._cache([chunk for _, chunk in new])
            self._tiles.update((digest, _Tile(chunk, 1)) for digest, chunk in new)
            self.misses += len(new)
        return begin + len(new)

    def drop(self, digests: Sequence[bytes], pinned: int) -> None:
        """Takes a request's pins off its first `pinned` tiles: it is over, or has lost its slot."""
        for digest in reversed(digests[:pinned]):
            tile = self._tiles[digest]
            tile.pins -= 1
            if not tile.pins:
                self._idle[digest] = None

    def evict(self, chunks: int) -> int:
        """Gives up tiles that nobody pins, least recently used first and leaves before what they
        continue, until so many chunks are given up or none is left; returns the bytes freed."""
        victims = list(itertools.islice(self._idle, max(0, chunks)))
        if not victims:
            return 0
        freed_bytes = self._uncache([self._tiles[digest].chunk for digest in victims])
        for digest in victims:
            del self._idle[digest], self._tiles[digest]
        return freed_bytes

    def clear(self) -> int:
        """Gives up every tile that nobody pins; returns the bytes freed."""
        return self.evict(self.evictable)

    def _pins(self, digest: bytes) -> int:
        tile = self._tiles.get(digest)
        return 0 if tile is None else tile.pins

    def _pin(self, digest: bytes, tile: _Tile) -> None:
        if not tile.pins:
            del self._idle[digest]
        tile.pins += 1
