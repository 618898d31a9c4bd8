"""The prefix cache against a naive model, and the names of tiles against hashlib by hand."""

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellm_jax.memory.prefix import PrefixCache, TileKeys

CHUNK_BYTES = 64


class Chunks:
    """What the pool does for the cache: one reference per chunk, never two."""

    def __init__(self):
        self.cached = set()
        self.refused = False

    def cache(self, ids):
        if self.refused:
            raise RuntimeError("refused")
        assert not self.cached & set(ids)
        assert len(set(ids)) == len(ids)
        self.cached |= set(ids)

    def uncache(self, ids):
        assert self.cached >= set(ids)
        self.cached -= set(ids)
        return len(ids) * CHUNK_BYTES


def make():
    chunks = Chunks()
    return PrefixCache(chunks.cache, chunks.uncache), chunks


def keys(tokens, tile_tokens=2, salt=b""):
    made = TileKeys(tile_tokens, salt)
    made.update(tokens)
    return made.digests


# Names.


def test_names_are_a_chain_of_sha256():
    link = hashlib.sha256(b"tenant").digest()
    expected = []
    for tile in ((1, 2, 3), (70000, 2**32 - 1, 0)):
        link = hashlib.sha256(link + struct.pack("<III", *tile)).digest()
        expected.append(link)
    assert keys((1, 2, 3, 70000, 2**32 - 1, 0, 9), 3, b"tenant") == expected


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=6), st.integers(1, 5))
def test_names_do_not_depend_on_how_tokens_arrive(parts, tile_tokens):
    whole = [token for part in parts for token in part]
    grown = TileKeys(tile_tokens, b"s")
    for part in parts:
        grown.update(part)
    assert grown.digests == keys(whole, tile_tokens, b"s")
    assert grown.num_tokens == len(whole)
    assert len(grown.digests) == len(whole) // tile_tokens


def test_a_name_stands_for_everything_before_it():
    assert keys([1, 2, 3, 4])[1] != keys([5, 2, 3, 4])[1]
    assert keys([1, 2])[0] == keys([1, 2, 3, 4])[0]
    assert not set(keys([1, 2], salt=b"a")) & set(keys([1, 2], salt=b"b"))


# The cache, by hand.


def test_a_prefix_is_found_held_and_given_up():
    cache, chunks = make()
    path = keys(range(8))
    assert cache.insert(path, 0, [10, 11, 12]) == 3
    assert cache.match(path) == 3
    assert (cache.chunks, cache.evictable) == (3, 0)
    assert cache.evict(3) == 0, "pinned tiles stay"
    cache.drop(path, 3)
    assert cache.evictable == 3
    assert cache.hold(path[:2]) == [10, 11]
    assert cache.evict(9) == CHUNK_BYTES, "only the unpinned leaf goes"
    assert chunks.cached == {10, 11}
    cache.drop(path, 2)
    assert cache.clear() == 2 * CHUNK_BYTES
    assert not chunks.cached
    assert (cache.hits, cache.misses) == (2, 3)


def test_least_recently_used_goes_first_and_leaves_before_their_stem():
    cache, chunks = make()
    left, right = keys([0, 0, 1, 1, 2, 2]), keys([0, 0, 3, 3, 4, 4])
    cache.insert(left, 0, [0, 1, 2])
    cache.drop(left, 3)
    stem = cache.hold(right[:1])
    assert stem == [0]
    cache.insert(right, 1, [3, 4])
    cache.drop(right, 3)
    gone = []
    while cache.evictable:
        before = set(chunks.cached)
        cache.evict(1)
        gone += before - chunks.cached
    assert gone == [2, 1, 4, 3, 0]


def test_what_two_computed_is_kept_once_and_pinned_by_the_first_only():
    cache, chunks = make()
    path = keys(range(8))
    assert cache.insert(path, 0, [1, 2]) == 2
    assert cache.insert(path, 0, [5, 6, 7]) == 0, "the second keeps its chunks to itself"
    assert chunks.cached == {1, 2}
    cache.drop(path, 2)
    assert cache.evictable == 2
    cache.clear()
    assert cache.insert(path, 0, [5, 6, 7]) == 3, "and may bring them in once the first's are gone"


def test_insertion_needs_the_tile_before_to_be_pinned():
    cache, chunks = make()
    path = keys(range(8))
    with pytest.raises(ValueError, match="hold it"):
        cache.insert(path, 1, [4])
    cache.insert(path, 0, [3])
    cache.drop(path, 1)
    with pytest.raises(ValueError, match="hold it"):
        cache.insert(path, 1, [4])
    assert chunks.cached == {3}


def test_a_refused_call_changes_nothing():
    cache, chunks = make()
    path = keys(range(8))
    chunks.refused = True
    with pytest.raises(RuntimeError):
        cache.insert(path, 0, [1, 2])
    assert (cache.chunks, cache.match(path)) == (0, 0)
    chunks.refused = False
    cache.insert(path, 0, [1])
    with pytest.raises(KeyError):
        cache.hold(path[:2])
    cache.drop(path, 1)
    assert cache.evictable == 1, "hold pinned nothing"


# The cache, against a model that looks at everything each time.


class Model:
    def __init__(self):
        self.tiles = {}  # path of tokens -> [chunk, holders, time of last use]
        self.now = 0

    def leaves(self):
        idle = [path for path, tile in self.tiles.items() if not tile[1]]
        return [p for p in idle if not any(q[:-1] == p for q in self.tiles)]

    def evict(self, chunks):
        gone = []
        while len(gone) < chunks and (leaves := self.leaves()):
            oldest = min(leaves, key=lambda p: self.tiles[p][2])
            gone.append(self.tiles.pop(oldest)[0])
        return gone


paths = st.lists(st.integers(0, 1), min_size=1, max_size=5)
operations = st.one_of(
    st.tuples(st.just("start"), paths),
    st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 3)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("evict"), st.integers(0, 4)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operations, max_size=60))
def test_against_a_model(script):
    cache, chunks = make()
    model = Model()
    running = []  # [path, digests, pinned]
    fresh = iter(range(10**6))
    for name, *arguments in script:
        model.now += 1
        if name == "start":
            path = tuple(arguments[0])
            digests = keys(path, 1)
            found = cache.match(digests)
            naive = [path[: n + 1] for n in range(len(path))]
            assert found == next(
                (n for n, p in enumerate(naive) if p not in model.tiles), len(path)
            )
            assert cache.hold(digests[:found]) == [model.tiles[p][0] for p in naive[:found]]
            for p in naive[:found]:
                model.tiles[p][1] += 1
            running.append([path, digests, found])
        elif name == "compute" and running:
            request = running[arguments[0] % len(running)]
            path, digests, pinned = request
            ids = [next(fresh) for _ in range(min(arguments[1], len(path) - pinned))]
            request[2] = cache.insert(digests, pinned, ids)
            for n, chunk in enumerate(ids, pinned):
                if path[: n + 1] in model.tiles:
                    break
                model.tiles[path[: n + 1]] = [chunk, 1, model.now]
                pinned += 1
            assert request[2] == pinned
        elif name == "end" and running:
            path, digests, pinned = running.pop(arguments[0] % len(running))
            cache.drop(digests, pinned)
            for n in range(pinned):
                model.tiles[path[: n + 1]][1] -= 1
                model.tiles[path[: n + 1]][2] = model.now
        elif name == "evict":
            before = set(chunks.cached)
            freed = cache.evict(arguments[0])
            gone = model.evict(arguments[0])
            assert before - chunks.cached == set(gone)
            assert freed == len(gone) * CHUNK_BYTES
        assert chunks.cached == {tile[0] for tile in model.tiles.values()}
        assert cache.chunks == len(model.tiles)
        assert cache.evictable == sum(not tile[1] for tile in model.tiles.values())
    for _, digests, pinned in running:
        cache.drop(digests, pinned)
    cache.clear()
    assert not chunks.cached
