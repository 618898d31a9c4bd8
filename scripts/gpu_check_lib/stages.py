"""The stages: what each is for, and how long it may take."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage; its code is the module of the same name.

    Attributes:
        name: on the command line, and of its files.
        what: it does, for people.
        budget_s: seconds after which it is ended.
        least_s: seconds that are kept for it where all have to end within a time.
        needs_build: whether it uses what the stage `build` installs.
    """

    name: str
    what: str
    budget_s: int
    least_s: int = 0
    needs_build: bool = True


STAGES = (
    Stage("build", "build the package with its CUDA kernels", 540, needs_build=False),
    Stage("facts", "what the design assumes about CUDA and XLA", 300, 90),
    Stage("tests", "the tests that are marked gpu, those of the kernels first", 480, 150),
    Stage("parity", "the engine against stored answers, float32 and bfloat16", 480, 60),
    Stage("kernels", "attention against bandwidth and matrix rate", 480, 100),
    Stage("decode", "a Llama-3-8B shape against the roofline", 540, 260),
    Stage("vmm", "what mapping costs, and inflation of 4 GiB and back", 420, 60),
    Stage("offline_static", "long prompts and the largest batch under static", 570, 130),
    Stage("offline_elastic", "the same under elastic", 570, 130),
    Stage("offline_chunked", "the same under static-chunked", 570, 100),
    Stage("offline", "the policies side by side", 60, 10),
    Stage("sanitizer", "compute-sanitizer over some of the kernel tests", 480, 40),
)

THREE_RUNS = ("build,facts,tests,parity", "build,kernels,decode,vmm", "build,offline,sanitizer")
"""Everything within half an hour, what matters most first; each run well inside ten minutes."""


def parse(text: str) -> list[Stage]:
    """Reads "a,b": the stages in their own order. "offline" stands for all that begin so."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = {stage.name for stage in STAGES}
    unknown = sorted(names - known)
    if "offline" in names:
        names |= {name for name in known if name.startswith("offline")}
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no stage {', '.join(unknown) or 'named'}; there are {', '.join(sorted(known))}"
        )
    return [stage for stage in STAGES if stage.name in names]
