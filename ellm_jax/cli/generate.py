"""`ellm generate`: text for one prompt as it comes, or for many."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ellm_jax.cli import options
from ellm_jax.cli.console import STANDARD, Failure, note, plain_errors, reading, write_json
from ellm_jax.config import format_bytes
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from ellm_jax.engine import Engine
    from ellm_jax.intake import Prompt

_EXAMPLES = """\
examples:
  ellm generate "Once upon a time"
  ellm generate "Once upon a time" "The old house" --max-tokens 60 --seed 1
  ellm generate --model ./my-model --chat --system "Answer briefly." "Why is the sky blue?"
  ellm generate --model ./my-model --input prompts.txt --json > answers.jsonl
  echo "The little fox" | ellm generate --quiet --temperature 0
  ellm generate "The fox was" --choice happy --choice sad
  ellm generate "Once upon a time" --regex "[A-Z][a-z ]{10,60}[.]"
  ellm generate --model ./my-model --json-schema person.json "Ada Lovelace, born in 1815:"

One prompt is streamed; several run together and are printed in their order. Without prompts, lines
are read from standard input. --json writes one line per prompt with texts, token ids and times.
Structured output needs llguidance: pip install 'ellm-jax[serve]'.
"""

_MAX_NUM_SEQS = 64


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="generate text from prompts",
        description="Generates text from prompts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="the text to go on from")
    options.add_model_option(parser)
    parser.add_argument(
        "--input", metavar="FILE", help="read prompts from a file, one per line; - for stdin"
    )
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is what a user says in a chat"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    parser.add_argument("--echo", action="store_true", help="write the prompt before its text")
    parser.add_argument("--json", action="store_true", help="write JSON, one line per prompt")
    parser.add_argument(
        "--stats", action="store_true", help="say at the end where memory and time went"
    )
    options.add_sampling_options(parser, max_tokens=200, temperature=0.8)
    options.add_engine_options(parser, max_num_seqs=None, warm_up=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ellm_jax.engine import Engine

    if args.system is not None and not args.chat:
        raise Failure("--system is for chats; add --chat")
    texts = _prompts(args)
    prompts = [_chat(text, args.system) if args.chat else text for text in texts]
    with plain_errors():
        params = options.sampling_params(args, max_tokens=200, temperature=0.8)
        # Who waits for one answer waits for the steps that it needs, and for no others.
        seats = _seats(len(prompts) * params.n)
        config = options.engine_config(args, max_num_seqs=seats, warm_up=False)
        engine = Engine.from_pretrained(args.model, config)
    with engine:
        begin_s = time.monotonic()
        if len(prompts) == 1 and params.n == 1 and not args.json:
            outputs = [_stream(engine, prompts[0], params, texts[0] if args.echo else "")]
        else:
            with plain_errors():
                outputs = engine.generate(prompts, params, progress=config.progress)
            _write(args, texts, outputs)
        wall_s = time.monotonic() - begin_s
        note(_summary(engine, outputs, wall_s), quiet=not config.progress)
        if args.stats:
            note(_statistics(engine))
    errors = [c.error for output in outputs for c in output.outputs if c.error is not None]
    if errors:
        raise Failure(f"{len(errors)} of {len(outputs)} failed: {errors[0]}", exit_code=1)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts' texts, from the arguments, a file, or standard input."""
    if args.prompt and args.input:
        raise Failure("prompts were given and --input too; give one of them")
    if args.prompt:
        return list(args.prompt)
    if args.input is None and sys.stdin.isatty():
        raise Failure(
            'there is no prompt; write one, as in: ellm generate "Once upon a time", '
            "or give --input FILE"
        )
    name = args.input or STANDARD
    with reading(name) as file:
        texts = [line.rstrip("\r\n") for line in file if line.strip()]
    if not texts:
        where = "standard input" if name == STANDARD else name
        raise Failure(f'{where} has no prompts; write one per line, or: ellm generate "PROMPT"')
    return texts


def _chat(text: str, system: str | None) -> Prompt:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def _seats(requests: int) -> int:
    """How many requests to compile for: as many as there are, in powers of four so that the
    compiled steps of one run serve the next."""
    seats = 1
    while seats < min(requests, _MAX_NUM_SEQS):
        seats *= 4
    return seats


def _stream(engine: Engine, prompt: Prompt, params: SamplingParams, echo: str) -> RequestOutput:
    """Writes a text as it comes; returns everything at the end."""
    with plain_errors():
        stream = engine.stream(prompt, params)
    sys.stdout.write(echo)
    written = 0
    with plain_errors():
        for output in stream:
            sys.stdout.write(output.text[written:])
            sys.stdout.flush()
            written = len(output.text)
    sys.stdout.write("\n")
    return output


def _write(
    args: argparse.Namespace, texts: Sequence[str], outputs: Sequence[RequestOutput]
) -> None:
    if args.json:
        for output in outputs:
            write_json(_as_json(output))
        return
    several = len(texts) > 1 or len(outputs[0].outputs) > 1
    for text, output in zip(texts, outputs, strict=True):
        for completion in output.outputs:
            if several:
                print(f"--- {text}")
            print(f"{text if args.echo else ''}{completion.text}")


def _as_json(output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    return {
        **dataclasses.asdict(output),
        "metrics": {
            "ttft_ms": metrics.ttft_ms,
            "tpot_ms": metrics.tpot_ms,
            "e2e_ms": metrics.e2e_ms,
            "preemptions": metrics.num_preemptions,
        },
    }


def _summary(engine: Engine, outputs: Sequence[RequestOutput], wall_s: float) -> str:
    """One line: how much, how fast, and whose memory."""
    tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    firsts = [o.metrics.ttft_ms for o in outputs if o.metrics.ttft_ms is not None]
    first = f", first after {min(firsts):.0f} ms" if firsts else ""
    memory = engine.memory()
    owners = ", ".join(
        f"{owner} {format_bytes(memory.peaks[owner])}"
        for owner in memory.by_owner()
        if memory.peaks.get(owner)
    )
    return (
        f"[{tokens} tokens in {wall_s:.2f} s, {tokens / max(wall_s, 1e-9):.1f} tok/s{first}; "
        f"memory at most: {owners}; limit {format_bytes(memory.limit_bytes)}]"
    )


def _statistics(engine: Engine) -> str:
    """Where memory and time went, in columns."""
    peaks = engine.memory().peaks
    lines = [f"{'memory at most':<16}"]
    lines += [f"  {owner:<14}{format_bytes(peaks[owner]):>12}" for owner in peaks]
    lines.append("host loop")
    for name, value in dataclasses.asdict(engine.stats()).items():
        shown = f"{value * 1000:.1f} ms" if name.endswith("_s") else str(value)
        lines.append(f"  {name.removesuffix('_s').replace('_', ' '):<14}{shown:>12}")
    return "\n".join(lines)
