"""What this machine has for the engine, and whether everything works: findings with remedies."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator

from ellm_jax.config import EngineConfig, format_bytes
from ellm_jax.doctor_cuda import look_at_gpus, try_gpu
from ellm_jax.doctor_finding import Finding, Level
from ellm_jax.memory.system import default_limit_bytes, free_memory_bytes

_PYTHONS = ((3, 11), (3, 13))
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tokenizers", "safetensors", "numpy")
_LARGEST_CHUNK_BYTES = 2 * 2**20
_SPARE_MAPPINGS = 4096
"""Mappings that the rest of a process takes, with a margin."""
_LARGE_PAGES_SINCE = (6, 1)
"""The Linux that first makes large pages of memory files on request."""
_SELF_TEST_MEMORY = "256MiB"


def examine(*, self_test: bool = True) -> Iterator[Finding]:
    """Looks at everything, what is quick first. A look that fails is a finding too."""
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("software", _software),
        ("gpu", look_at_gpus),
        ("backends", _backends),
        ("processor", _processor),
        ("memory", _memory),
        ("kernel", _kernel),
        ("cache", _cache),
    ]
    if self_test:
        looks += [("self-test", _mapping), ("self-test", try_gpu), ("self-test", _generation)]
    for group, look in looks:
        try:
            yield from look()
        except Exception as error:
            name = look.__name__.removeprefix("_")
            yield Finding(
                group, name, "error", f"failed: {error}", "see the message; " + _REINSTALL
            )


_REINSTALL = "if it does not help, install ellm_jax again"


def _software() -> Iterator[Finding]:
    low, high = _PYTHONS
    level: Level = "ok" if low <= sys.version_info[:2] <= high else "warning"
    remedy = "" if level == "ok" else "use Python 3.11 to 3.13, which is what is tested"
    yield Finding("software", "python", level, platform.python_version(), remedy)
    for name in _PACKAGES:
        try:
            yield Finding("software", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("software", name, "error", "missing", f"pip install {name}")


def _backends() -> Iterator[Finding]:
    import jax

    from ellm_jax import _native
    from ellm_jax.devices import open_devices

    [device] = open_devices("auto")
    names = ", ".join(f"{each.platform}:{each.id} {each.device_kind}" for each in jax.devices())
    yield Finding("backends", "jax devices", "ok", names)
    yield Finding("backends", "engines run on", "ok", device.platform)
    yield Finding("backends", "cpu int8 kernels", "ok", _native.int8_isa())
    isa = _native.cpu_isa()
    slow = isa == "generic"
    yield Finding(
        "backends",
        "cpu kernels",
        "warning" if slow else "ok",
        isa,
        "a processor with AVX2 or AVX-512 is several times faster" if slow else "",
    )


def _processor() -> Iterator[Finding]:
    from ellm_jax.devices.threads import cpu_quota, usable_cores

    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    value = f"{cores} usable of {os.cpu_count()}"
    if quota is not None and quota < cores:
        yield Finding(
            "processor",
            "cores",
            "warning",
            f"{value}, limited to the time of {quota:.1f}",
            f"an engine on the CPU runs {usable_cores()} threads; raise the limit for more",
        )
    else:
        yield Finding("processor", "cores", "ok", value)


def _memory() -> Iterator[Finding]:
    free, limit = free_memory_bytes(), default_limit_bytes()
    yield Finding(
        "memory",
        "free",
        "ok" if free >= 2**30 else "warning",
        f"{format_bytes(free)}; without --device-memory an engine takes at most "
        f"{format_bytes(limit)}",
        "" if free >= 2**30 else "end other programs: this is enough for small models only",
    )
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = addresses == resource.RLIM_INFINITY
    yield Finding(
        "memory",
        "addresses",
        "ok" if unlimited else "warning",
        "not limited" if unlimited else f"limited to {format_bytes(addresses)}",
        ""
        if unlimited
        else "ulimit -v unlimited: every request reserves addresses for the longest context",
    )


def _kernel() -> Iterator[Finding]:
    most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    wanted = default_limit_bytes() // _LARGEST_CHUNK_BYTES + _SPARE_MAPPINGS
    enough = most >= wanted
    yield Finding(
        "kernel",
        "vm.max_map_count",
        "ok" if enough else "warning",
        f"{most}; a pool of the free memory in chunks of 2 MiB needs at most {wanted}",
        "" if enough else f"sysctl vm.max_map_count={wanted}, or set --device-memory lower",
    )
    yield Finding("kernel", "large pages for KV", "ok", _large_pages(), "")


def _large_pages() -> str:
    """What the kernel has of them. The driver asks for each itself, so no setting matters."""
    try:
        size = int(pathlib.Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return "none: the kernel has no transparent ones"
    release = platform.release()
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < _LARGE_PAGES_SINCE:
        return f"none: Linux {release} makes none of memory files; 6.1 and later do"
    return f"{format_bytes(size)} where a prompt fills them"


def _cache() -> Iterator[Finding]:
    from ellm_jax.runtime.compiler import default_cache_directory

    directory = default_cache_directory()
    entries = list(directory.glob("*")) if directory.is_dir() else []
    size = sum(entry.stat().st_size for entry in entries if entry.is_file())
    existing = next(d for d in (directory, *directory.parents) if d.exists())
    writable = os.access(existing, os.W_OK)
    yield Finding(
        "cache",
        "compiled steps",
        "ok" if writable else "warning",
        f"{directory}, {format_bytes(size)}",
        ""
        if writable
        else f"{existing} is not writable; give --compilation-cache DIR, or every "
        "start compiles anew",
    )


def _mapping() -> Iterator[Finding]:
    """Maps a chunk and gives it back."""
    from ellm_jax._native import KvCache, KvLayout, Pool

    layout = KvLayout.choose(2, 2, 64, 4, 1024, 2)
    pool = Pool(layout.chunk_bytes, 2 * layout.chunk_bytes)
    cache = KvCache(pool, layout)
    try:
        slot = cache.take_slot(1)
        cache.extend([slot], [1])
        mapped = cache.mapped_tokens(slot)
        cache.release(slot)
    finally:
        cache.close()
    stats = pool.usage()
    yield Finding(
        "self-test",
        "virtual memory",
        "ok",
        f"mapped a chunk of {format_bytes(layout.chunk_bytes)} for {mapped} tokens and gave it "
        f"back (memfd: {stats['create_us']} us to create)",
    )


def _generation() -> Iterator[Finding]:
    """Generates with the model in the package."""
    from ellm_jax.assembly import TINY_MODEL
    from ellm_jax.engine import Engine
    from ellm_jax.sampling import SamplingParams

    if not (TINY_MODEL / "config.json").is_file():
        remedy = "install ellm_jax again, or generate with --model DIR"
        yield Finding("self-test", "model in the package", "error", "missing", remedy)
        return
    config = EngineConfig(
        device_memory=_SELF_TEST_MEMORY, max_num_seqs=1, max_model_len=64, progress=False
    )
    with Engine.from_pretrained(None, config) as engine:
        output = engine.generate("Once upon", SamplingParams(temperature=0, max_tokens=4))[0]
        memory = engine.memory()
    whole = sum(memory.by_owner().values()) == memory.limit_bytes
    yield Finding(
        "self-test",
        "generation",
        "ok" if output.outputs[0].error is None and whole else "error",
        f"{len(output.token_ids)} tokens: {output.text!r}",
        "" if whole else "the ledger does not add up; please report this",
    )
