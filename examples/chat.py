"""A chat in the terminal, over the OpenAI-compatible server.

    ellm serve --model DIR --http 127.0.0.1:8000 &
    python examples/chat.py [--url http://127.0.0.1:8000/v1] [--key KEY] [--system TEXT]

Needs OpenAI's client: pip install openai. An empty line ends it.
"""

import argparse
import os

from openai import OpenAI, OpenAIError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key=args.key)
    model = client.models.list().data[0].id
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while text := ask("you: "):
        messages.append({"role": "user", "content": text})
        try:
            answer = say(client, model, messages, args.temperature, args.max_tokens)
        except OpenAIError as error:
            print(f"\n{error}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def ask(prompt: str) -> str:
    """A line from the user; empty at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def say(
    client: OpenAI,
    model: str,
    messages: list[dict[str, str]],
    temperature: float,
    max_tokens: int,
) -> str:
    """Prints an answer as it comes; all of it."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=temperature,
        max_completion_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = []
    print(f"{model}: ", end="", flush=True)
    for chunk in stream:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            print(pieces[-1], end="", flush=True)
        if chunk.usage is not None:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {cached} of them cached,", end=" ")
            print(f"{chunk.usage.completion_tokens} out]")
    return "".join(pieces)


if __name__ == "__main__":
    main()
