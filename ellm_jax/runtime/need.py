"""What a step takes beyond its arguments, from XLA's own statement before it runs."""

from __future__ import annotations

import jax

# A margin for allocator rounding, the small buffers of the dispatch and the kernels' scratch of
# each thread. Chosen, not measured; the resident memory test bounds what it may hide.
_SLACK_BYTES = 1 << 20


def step_need_bytes(compiled: jax.stages.Compiled, extra_bytes: int) -> int:
    """Bytes of temporaries and results of one step, and of the kernels' own buffers."""
    stats = compiled.memory_analysis()
    assert stats is not None, "this backend does not state what a compiled step needs"
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return int(stats.temp_size_in_bytes + results + extra_bytes + _SLACK_BYTES)
