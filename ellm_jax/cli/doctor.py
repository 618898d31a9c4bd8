"""`ellm doctor`: what this machine has, whether all works, and what to do where it does not."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from ellm_jax.cli.console import write_json
from ellm_jax.doctor import examine
from ellm_jax.doctor_finding import Finding

_EXAMPLES = """\
examples:
  ellm doctor
  ellm doctor --json
  ellm doctor --no-self-test       without mapping memory and generating

The exit code is 1 where something is missing that the engine cannot work without.
"""
_MARKS = {"ok": "+", "warning": "!", "error": "x"}


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has and what is missing",
        description="Says what this machine has for the engine, tries it out, and says what to do "
        "about what is missing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")
    parser.add_argument("--no-self-test", action="store_true", help="only look, try nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    stream = examine(self_test=not args.no_self_test)
    findings: list[Finding] = []
    if args.json:
        findings = list(stream)
    else:
        for group, members in itertools.groupby(stream, key=lambda finding: finding.group):
            print(group)
            for finding in members:
                findings.append(finding)
                print(_lines(finding), flush=True)
    works = all(finding.level != "error" for finding in findings)
    if args.json:
        write_json({"works": works, "findings": [dataclasses.asdict(f) for f in findings]})
    else:
        print("all works" if works else "something is missing; see the lines with x")
    return 0 if works else 1


def _lines(finding: Finding) -> str:
    line = f"  {_MARKS[finding.level]} {finding.name}: {finding.value}"
    return f"{line}\n      -> {finding.remedy}" if finding.remedy else line
