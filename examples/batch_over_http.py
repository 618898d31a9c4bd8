"""Runs a file of prompts as a batch, over the OpenAI-compatible server.

    ellm serve --model DIR --http 127.0.0.1:8000 &
    python examples/batch_over_http.py --make 1000 prompts.jsonl
    python examples/batch_over_http.py prompts.jsonl answers.jsonl

A line of the input is {"prompt": "..."} or {"messages": [...]}, with any other fields of the API
beside it. Lines that failed are written to ANSWERS.errors. Needs OpenAI's client: pip install
openai.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from openai import OpenAI

POLL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--make", type=int, metavar="N", help="write an input of N prompts")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--max-tokens", type=int, default=64, help="where a line says nothing")
    args = parser.parse_args()
    if args.make is not None:
        lines = [{"prompt": f"A short story about the number {i}:"} for i in range(args.make)]
        args.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif args.output is None:
        parser.error("give a file for the answers")
    else:
        run(OpenAI(base_url=args.url, api_key=args.key), args.input, args.output, args.max_tokens)


def run(client: OpenAI, source: Path, target: Path, max_tokens: int) -> None:
    model = client.models.list().data[0].id
    bodies = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    if not bodies:
        sys.exit(f"{source} has no prompts")
    # A batch is for one of the two endpoints.
    endpoint = "/v1/chat/completions" if "messages" in bodies[0] else "/v1/completions"
    requests = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": endpoint,
            "body": {"model": model, "max_tokens": max_tokens, **body},
        }
        for number, body in enumerate(bodies, 1)
    ]
    text = "\n".join(json.dumps(request) for request in requests)
    file = client.files.create(file=(source.name, text.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    begin_s = time.monotonic()
    while batch.status not in ("completed", "failed", "cancelled"):
        time.sleep(POLL_S)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        print(f"\r{batch.status}: {counts.completed + counts.failed} of {counts.total}", end="")
    print(f" in {time.monotonic() - begin_s:.1f} s")
    if batch.errors is not None:
        sys.exit("\n".join(f"line {error.line}: {error.message}" for error in batch.errors.data))
    for file_id, path in (
        (batch.output_file_id, target),
        (batch.error_file_id, target.with_name(f"{target.name}.errors")),
    ):
        if file_id is not None:
            path.write_bytes(client.files.content(file_id).read())
            client.files.delete(file_id)
            print(path)
    client.files.delete(file.id)


if __name__ == "__main__":
    main()
