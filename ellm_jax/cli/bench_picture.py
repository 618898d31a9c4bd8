"""`ellm bench picture`: draws what other kinds saved."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ellm_jax.bench.trace_request import WorkloadError
from ellm_jax.cli.console import Failure, note, reading

_EXAMPLES = """\
examples:
  ellm bench offline --workload w.jsonl --device-memory 64MiB --policy all --save r.json
  ellm bench picture r.json --output policies.png
  ellm bench picture r.json --memory elastic --output memory.svg
  ellm bench picture r2k.json r8k.json r16k.json --output policies.png

Needs matplotlib: pip install 'ellm-jax[bench]'.
"""


def add_kind(kinds: Any) -> None:
    """Adds the kind to the parser."""
    parser = kinds.add_parser(
        "picture",
        help="draw saved results",
        description="Draws results that were saved with --save: policies or engines side by side "
        "as bars, or with --memory the memory of one policy by owner over time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="FILE", help="saved with --save")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the picture; .png, .svg or .pdf"
    )
    parser.add_argument("--memory", metavar="P", help="draw the memory under this policy")
    parser.add_argument("--title", metavar="TEXT", help="above the picture")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ellm_jax.bench.figures import figures_of
    from ellm_jax.bench.pictures import PictureUnavailable, draw_bars, draw_memory

    results = [_read(name) for name in args.results]
    try:
        if args.memory is None:
            sides = "Engines" if results[0].get("kind") == "peers" else "Policies"
            draw_bars(figures_of(results), args.output, args.title or f"{sides} side by side")
        else:
            timeline = _timeline(args.results, results, args.memory)
            draw_memory(timeline, args.output, args.title or f"Memory by owner, {args.memory}")
    except PictureUnavailable as error:
        raise Failure(str(error), exit_code=1) from error
    except WorkloadError as error:
        raise Failure(str(error)) from error
    except ValueError as error:
        # Of the library: an ending that it knows no format for.
        raise Failure(f"{args.output}: {error}") from error
    except KeyError as error:
        raise Failure(f"a result lacks {error}; measure again with this version") from error
    note(f"ellm: wrote {args.output}")
    return 0


def _read(name: str) -> dict[str, Any]:
    with reading(name) as file:
        text = file.read()
    try:
        result = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Failure(f"{name} is no JSON: {error}; give what --save wrote") from error
    if not isinstance(result, dict):
        raise Failure(f"{name} is no result of a measurement; give what --save wrote")
    return result


def _timeline(names: list[str], results: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    if len(results) > 1:
        raise Failure("--memory draws one result; give one file")
    timelines = results[0].get("timelines", {})
    if policy not in timelines:
        there = ", ".join(timelines) or "none"
        raise Failure(f"{names[0]} has no memory of {policy!r}; there is: {there}")
    timeline: dict[str, Any] = timelines[policy]
    return timeline
