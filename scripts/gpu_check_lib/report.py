"""What a stage found: rows for the table, and everything else as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NO_GPU = "no GPU"


@dataclass
class Row:
    """One finding.

    Attributes:
        what: was measured or tried.
        value: found, for people.
        bar: what is asked of it; "" where nothing is.
        met: whether the bar is met; None where there is none, or it could not be looked at.
    """

    what: str
    value: str
    bar: str = ""
    met: bool | None = None


@dataclass
class Report:
    """What a stage found. Written after every row, so that a stage that is ended has not worked in
    vain.

    Attributes:
        path: of the JSON file.
        judges: whether bars are looked at: tiny sizes on a CPU say nothing about them.
        status: "running", "passed", "failed" or "not run".
        reason: why not passed.
        rows: for the table.
        data: everything else.
    """

    path: Path
    judges: bool = True
    status: str = "running"
    reason: str = ""
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, value: str, bar: str = "", met: bool | None = None) -> None:
        """Adds a row."""
        if not self.judges:
            bar, met = "", None
        self.rows.append(Row(what, value, bar, met))
        print(f"{what}: {value}" + (f" ({bar}: {'met' if met else 'MISSED'})" if bar else ""))
        sys.stdout.flush()
        self.write()

    def add_share(self, what: str, value: float, least: float) -> None:
        """Adds a share that is to be at least so much."""
        self.add(what, f"{value:.1%}", f"at least {least:.0%}", value >= least)

    def add_most(self, what: str, value: float, most: float) -> None:
        """Adds a share that is to be less than so much."""
        self.add(what, f"{value:.2%}", f"under {most:.0%}", value < most)

    def skip(self, what: str, reason: str = NO_GPU) -> None:
        """Adds a row that says why something was not done."""
        self.add(what, f"not run: {reason}")

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        kept = {
            "status": self.status,
            "reason": self.reason,
            "rows": [asdict(row) for row in self.rows],
            "data": self.data,
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(self.path)


class NotRun(Exception):
    """A stage cannot run here; its message says why."""


@dataclass(frozen=True)
class Job:
    """What a stage is told.

    Attributes:
        report: what it finds.
        out: folder for its files.
        repo: the sources.
        build: folder of the build, and of the compiled steps.
        dry_run: tiny sizes, on the CPU.
        ends_s: when it is ended, on the monotonic clock.
    """

    report: Report
    out: Path
    repo: Path
    build: Path
    dry_run: bool
    ends_s: float

    @property
    def left_s(self) -> float:
        """Seconds until it is ended."""
        return self.ends_s - time.monotonic()


def main(stage: Callable[[Job], None]) -> None:
    """Runs a stage as a program: OUT REPO BUILD BUDGET_S [--dry-run], named after its module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("repo", type=Path)
    parser.add_argument("build", type=Path)
    parser.add_argument("budget_s", type=float)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    report = Report(args.out / f"{args.name}.json", judges=not args.dry_run)
    report.write()
    job = Job(
        report,
        args.out,
        args.repo,
        args.build,
        args.dry_run,
        time.monotonic() + args.budget_s,
    )
    try:
        stage(job)
        report.status = "passed"
    except NotRun as reason:
        report.status, report.reason = "not run", str(reason)
    except BaseException as error:
        traceback.print_exc()
        report.status, report.reason = "failed", f"{type(error).__name__}: {error}"
    report.write()
    sys.stdout.flush()
    sys.exit(report.status == "failed")
