#!/usr/bin/env python3
"""Tells a story over gRPC, with the typed client.

    ellm serve --grpc 127.0.0.1:50051
    python examples/grpc_client.py "Once upon a time"

Any other client works as well; the server describes itself (reflection):

    grpcurl -plaintext -d '{"text": "Once upon a time", "sampling": {"max_tokens": 40}}' \\
        127.0.0.1:50051 ellm.v1.EngineService/GenerateStream
    grpcurl -plaintext 127.0.0.1:50051 grpc.health.v1.Health/Check
"""

import argparse
import sys

from ellm_jax import SamplingParams
from ellm_jax.client import Client, ClientError, Tls


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="of the server")
    parser.add_argument("--api-key", help="where the server asks for one")
    parser.add_argument("--ca", help="file with the authority of the server's certificate, for TLS")
    parser.add_argument("--max-tokens", type=int, default=100)
    args = parser.parse_args()

    tls = None if args.ca is None else Tls(ca=args.ca)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.8)
    try:
        with Client(args.address, api_key=args.api_key, tls=tls) as client:
            print(args.prompt, end="", flush=True)
            for delta in client.stream(args.prompt, params):
                print(delta.text, end="", flush=True)
            print()
            usage = delta.usage
    except ClientError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if usage is not None and usage.ttft_ms is not None:
        print(
            f"[{usage.completion_tokens} tokens, the first after {usage.ttft_ms:.0f} ms]",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
