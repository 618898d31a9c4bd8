"""Prefixes that requests share: who takes which tiles from the cache, and who waits for whom."""

from __future__ import annotations

from ellm_jax._native import OutOfMemory
from ellm_jax.memory.ledger import Ledger
from ellm_jax.memory.prefix import TileKeys
from ellm_jax.request import Request


class PrefixSharing:
    """Gives requests their slots, with the tiles that the cache has, and brings in what they
    compute. Where the ledger keeps no prefixes it only gives slots."""

    def __init__(self, ledger: Ledger):
        """Takes the memory."""
        self._ledger = ledger
        self._cache = ledger.prefix
        self._computing: dict[bytes, Request] = {}

    def found(self, request: Request) -> int:
        """How many leading tiles of a request are in the cache. At least one token is left to
        compute: the next one is sampled from its result."""
        if self._cache is None or request.synthetic or request.wants_prompt_logprobs:
            return 0
        digests = self._keys(request).digests
        most = (request.num_tokens - 1) // self._ledger.tile_tokens
        return self._cache.match(digests[:most])

    def in_use(self, request: Request, found: int) -> int:
        """How many of the tiles found somebody uses: those cost no room at all."""
        if self._cache is None or request.keys is None:
            return 0
        return self._cache.pinned(request.keys.digests[:found])

    def comes_soon(self, request: Request, found: int) -> bool:
        """Whether a request that runs is computing the tile after those found: who waits for it
        need not compute it again."""
        keys = request.keys
        if keys is None or found >= len(keys.digests):
            return False
        if found >= (request.num_tokens - 1) // self._ledger.tile_tokens:
            return False
        return self._computing.get(keys.digests[found], request) is not request

    def open_slot(self, request: Request, found: int) -> bool:
        """Gives a request a slot with its first `found` tiles from the cache, or without them if
        the system refuses to map those. False when no slot is left."""
        ledger, cache, keys = self._ledger, self._cache, request.keys
        if found:
            assert cache is not None
            assert keys is not None
            chunks = cache.hold(keys.digests[:found])
            try:
                request.slot = ledger.open_slot(request.num_tokens, chunks)
            except RuntimeError as error:
                cache.drop(keys.digests, found)
                if isinstance(error, OutOfMemory):
                    return False
                found = 0
        if request.slot is None:
            try:
                request.slot = ledger.open_slot(request.num_tokens + 1)
            except OutOfMemory:
                return False
        request.pinned = found
        request.computed = request.settled = found * ledger.tile_tokens
        if keys is not None:
            most = len(request.prompt_ids) // ledger.tile_tokens
            for digest in keys.digests[found:most]:
                self._computing.setdefault(digest, request)
        return True

    def bring_in(self, request: Request) -> None:
        """Puts the full tiles that a request has computed, and that the host knows the tokens of,
        into the cache. No step in flight may still have to compute them."""
        cache, keys = self._cache, request.keys
        if cache is None or keys is None or request.slot is None or request.synthetic:
            return
        tile = self._ledger.tile_tokens
        known = len(request.prompt_ids) + len(request.output_ids)
        full = min(request.settled, known) // tile
        if full <= request.pinned:
            return
        self._keys(request)
        slot, begin = request.slot, request.pinned
        chunks = self._ledger.kv.slot_chunks(slot, begin, full)
        request.pinned = cache.insert(keys.digests, begin, chunks)
        for digest in keys.digests[begin:full]:
            self._forget(digest, request)

    def let_go(self, request: Request) -> None:
        """Takes a request's pins off; it has lost its slot."""
        if self._cache is None or request.keys is None:
            return
        self._cache.drop(request.keys.digests, request.pinned)
        request.pinned = 0
        most = len(request.prompt_ids) // self._ledger.tile_tokens
        for digest in request.keys.digests[:most]:
            self._forget(digest, request)

    def _keys(self, request: Request) -> TileKeys:
        keys = request.keys
        if keys is None:
            keys = request.keys = TileKeys(self._ledger.tile_tokens, request.salt)
        known = len(request.prompt_ids) + len(request.output_ids)
        if keys.num_tokens < known:
            keys.update(request.tokens(keys.num_tokens, known))
        return keys

    def _forget(self, digest: bytes, request: Request) -> None:
        if self._computing.get(digest) is request:
            del self._computing[digest]
