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
        needs_build: whether it uses what the stage `build` installs.
    """

    name: str
    what: str
    budget_s: int
    needs_build: bool = True


STAGES = (
    Stage("build", "build the package with its CUDA kernels", 540, needs_build=False),
    Stage("facts", "what the design assumes about CUDA and XLA", 300),
    Stage("tests", "the tests that are marked gpu", 480),
    Stage("parity", "the engine against stored answers, float32 and bfloat16", 480),
    Stage("sanitizer", "compute-sanitizer over the kernel tests", 480),
    Stage("kernels", "attention against bandwidth and matrix rate", 480),
    Stage("vmm", "what mapping costs, and inflation of 4 GiB and back", 420),
    Stage("decode", "a Llama-3-8B shape against the roofline", 540),
    Stage("offline", "long prompts under each policy, and the largest batch", 570),
)


def parse(text: str) -> list[Stage]:
    """Reads "a,b": the stages in their own order."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {stage.name for stage in STAGES}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no stage {', '.join(unknown) or 'named'}; there are {', '.join(sorted(known))}"
        )
    return [stage for stage in STAGES if stage.name in names]
