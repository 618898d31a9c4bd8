"""Fixtures shared by the tests: small checkpoints, and engines over them."""

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hf_checkpoints
import jax
import pytest
from checked_engine import CheckedEngine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-tests-on",
        default="cuda",
        choices=("cuda", "cpu"),
        help="what tests/gpu runs on; on the CPU, those that can show that they themselves work",
    )
    parser.addoption(
        "--cancels",
        type=int,
        default=60,
        help="how many calls the soak of cancelled calls makes",
    )


LONGEST = (
    "test_tensor_parallel.py",
    "test_int8.py",
    "test_kv_int8.py",
    "test_engine.py",
    "test_elastic.py",
)
"""Files that take minutes come first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half surrogates in what a test logged or printed would end the process that reports it."""
    report = yield
    report.sections = [(name, _encodable(text)) for name, text in report.sections]
    why = str(report.longrepr)
    if report.failed and why != _encodable(why):
        report.longrepr = _encodable(why)
    return report


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request: pytest.FixtureRequest) -> None:
    """Compiled steps are kept between tests and runs: most of a test's time would be theirs."""
    jax.config.update("jax_compilation_cache_dir", str(request.config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random-weight checkpoint, once per name and context."""
    made: dict[tuple[str, int | None], Path] = {}

    def make(name: str = "llama", *, context: int | None = None) -> Path:
        if (name, context) not in made:
            path = hf_checkpoints.make_checkpoint(tmp_path_factory.mktemp("model"), name)
            if context is not None:
                config = json.loads((path / "config.json").read_text())
                config["max_position_embeddings"] = context
                (path / "config.json").write_text(json.dumps(config))
            made[name, context] = path
        return made[name, context]

    return make


@pytest.fixture
def make_engine() -> Iterator[CheckedEngine]:
    """Engines of a test; closed and checked at its end."""
    maker = CheckedEngine()
    yield maker
    maker.finish()
