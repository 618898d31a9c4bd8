"""The floors of the house: each part imports only what lies below it, and nothing in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ellm_jax

ROOT = Path(ellm_jax.__file__).parent

# Top floor first. A module belongs to the longest entry that its name starts with.
FLOORS = [
    ["ellm_jax.cli", "ellm_jax.__main__"],
    ["ellm_jax.bench.serving"],
    ["ellm_jax.serving.run"],
    ["ellm_jax.serving.watch"],
    ["ellm_jax.serving.dashboard"],
    ["ellm_jax.serving.grpc", "ellm_jax.serving.http"],
    ["ellm_jax.bench", "ellm_jax.serving", "ellm_jax.batch_file", "ellm_jax.doctor"],
    ["ellm_jax.doctor_cuda", "ellm_jax.doctor_finding"],
    ["ellm_jax.engine"],
    ["ellm_jax.sim"],
    ["ellm_jax.completions"],
    ["ellm_jax.assembly", "ellm_jax.engine_thread", "ellm_jax.limits"],
    ["ellm_jax.progress"],
    ["ellm_jax.intake"],
    ["ellm_jax.host_loop"],
    ["ellm_jax.pressure"],
    ["ellm_jax.recovery"],
    ["ellm_jax.lifecycle"],
    ["ellm_jax.tiering", "ellm_jax.executor", "ellm_jax.step_results", "ellm_jax.loop_stats"],
    ["ellm_jax.devices"],
    ["ellm_jax.execution"],
    ["ellm_jax.scheduler"],
    ["ellm_jax.memory"],
    ["ellm_jax.runtime"],
    ["ellm_jax.checkpoint"],
    ["ellm_jax.models"],
    ["ellm_jax.runtime.ops"],
    ["ellm_jax.structured"],
    ["ellm_jax.text"],
    ["ellm_jax.tokenizer"],
    ["ellm_jax.request"],
    ["ellm_jax.client"],
    ["ellm_jax.outputs", "ellm_jax.sampling", "ellm_jax.config", "ellm_jax.overlap"],
    ["ellm_jax.structured.output", "ellm_jax.structured.matcher"],
    ["ellm_jax.protocol"],
    ["ellm_jax._native"],
]
WITHOUT_JAX = ["ellm_jax.scheduler", "ellm_jax.memory", "ellm_jax.request", "ellm_jax.sampling"]
WITHOUT_JAX += ["ellm_jax.config", "ellm_jax.outputs", "ellm_jax.tokenizer", "ellm_jax.text"]
WITHOUT_JAX += ["ellm_jax.structured", "ellm_jax.overlap"]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that `path` imports when it runs, those only for type checking left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in known or alias.name == "_native" else module)
    return found


def floor(name: str) -> int:
    heights = [
        (len(part), height)
        for height, entry in enumerate(FLOORS)
        for part in entry
        if name == part or name.startswith(part + ".")
    ]
    if heights:
        return max(heights)[1]
    raise AssertionError(f"{name} is on no floor; give it one in {__file__}")


KNOWN = modules()
GRAPH = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


@pytest.mark.parametrize("name", [n for n in KNOWN if n != "ellm_jax"])
def test_imports_go_downwards(name):
    for imported in GRAPH[name]:
        if imported.startswith("ellm_jax."):
            assert floor(imported) >= floor(name), f"{name} imports {imported}, which lies above"


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"a cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for imported in GRAPH.get(name, ()):
            # Importing a package's module runs the package's __init__ first; that is no cycle.
            if imported in GRAPH and not name.startswith(imported + "."):
                visit(imported, [*path, name])
        done.add(name)

    for name in GRAPH:
        visit(name, [])


def test_planning_and_memory_know_no_jax():
    for name, imported in GRAPH.items():
        if any(name == part or name.startswith(part + ".") for part in WITHOUT_JAX):
            outside = {i.split(".")[0] for i in imported}
            assert not outside & {"jax", "flax", "jaxlib", "orbax"}, name


@pytest.mark.parametrize(
    "module",
    [
        "ellm_jax",
        "ellm_jax.host_loop",
        "ellm_jax.scheduler.batching",
        "ellm_jax.memory.ledger",
        "ellm_jax.cli",
    ],
)
def test_importing_is_cheap(module):
    code = f"import {module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
