"""Text to tokens and back: a checkpoint's tokenizer, its chat template, and streamed text."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

CHAT_CHARS_MAX = 4 * 2**20
"""Most characters that a chat template may write."""

_CONTEXT_TOKENS = 4
"""Prompt tokens a stream starts from. Decoders look at most one word back (a leading space)."""


class TokenizerMissing(FileNotFoundError):  # it may be expected: token ids only
    """The directory has no tokenizer; requests by token ids work without one."""


class ChatTemplateError(ValueError):
    """There is no chat template, or it refuses these messages."""


class Tokenizer:
    """A Hugging Face ``tokenizer.json`` with what a checkpoint keeps beside it.

    Attributes:
        backend: The ``tokenizers.Tokenizer``, with truncation and padding off.
        special_tokens: Such as "bos_token" -> "<s>", as templates know them.
        chat_templates: Template sources by name; the one without a name is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        # A file may carry the settings of its training. Applied here they would lose text.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and chat template files.

        A template in ``chat_template.jinja`` goes before one in ``chat_template.json``, and
        that before those in ``tokenizer_config.json``.

        Raises:
            TokenizerMissing: there is no tokenizer.json.
            ValueError: a file that cannot be read as what its name says.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise TokenizerMissing(
                f"no tokenizer.json in {directory}; give prompts as token ids, or write one with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{file} is not a tokenizer that the tokenizers library reads ({error}); "
                "download it again"
            ) from error
        config = _read_json(directory / "tokenizer_config.json")
        special = {
            name: token
            for name, value in config.items()
            if name.endswith("_token") and (token := _token_text(value)) is not None
        }
        return cls(backend, special, dict(_read_templates(directory, config)))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, special: str) -> int | None:
        """The id of a special token by its name, such as "eos_token"; None if there is none."""
        text = self.special_tokens.get(special)
        found: int | None = None if text is None else self.backend.token_to_id(text)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A chat template writes special tokens itself: pass False then."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        template_name: str | None = None,
        **variables: Any,
    ) -> str:
        """Writes a conversation as the prompt that the model was trained on.

        The template runs in a sandbox: it sees what it is given here and can change none of it.

        Args:
            messages: Mappings with "role" and "content", oldest first.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: End with the opening of an answer.
            template_name: Which of several templates. None takes "tool_use" where there are
                tools and such a template, else "default".
            **variables: What else the template knows, such as ``enable_thinking``.

        Returns:
            The prompt; encode it with ``add_special_tokens=False``.

        Raises:
            ChatTemplateError: no such template, one that is broken, one that refuses the
                messages, or one that writes more than ``CHAT_CHARS_MAX`` characters.
        """
        if not messages:
            raise ChatTemplateError("no messages; give at least one with a role and a content")
        name = template_name or (
            "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        )
        values = {
            **self.special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        length_chars = 0
        try:
            for piece in self._template(name).generate(values):
                pieces.append(piece)
                length_chars += len(piece)
                if length_chars > CHAT_CHARS_MAX:
                    raise ChatTemplateError(
                        f"chat template {name!r} writes more than {CHAT_CHARS_MAX} characters "
                        f"for {len(messages)} messages; send fewer or shorter ones"
                    )
        except ChatTemplateError:
            raise
        except Exception as error:  # whatever the template's expressions may raise
            raise ChatTemplateError(
                f"chat template {name!r} refuses these messages: {error}"
            ) from error
        return "".join(pieces)

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if name not in self.chat_templates:
                known = ", ".join(sorted(self.chat_templates)) or "none"
                raise ChatTemplateError(
                    f"no chat template {name!r} (there are: {known}); give the prompt as text, "
                    "or put a chat_template.jinja into the model's directory"
                )
            try:
                template = _environment().from_string(self.chat_templates[name])
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"chat template {name!r}, line {error.lineno}: {error.message}"
                ) from error
            self._compiled[name] = template
        return self._compiled[name]


class Detokenizer:
    """The text of one request, as its tokens come.

    A character whose bytes are spread over tokens comes with the last of them. All that comes
    out of ``feed`` and ``finish`` is together the text of the tokens after the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ):
        """Starts after ``prompt_ids``: a first word keeps the space before it."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []
        for token in prompt_ids[-_CONTEXT_TOKENS:]:
            self._step(token)
        self._held.clear()

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; often empty or one word."""
        return "".join(self._step(token) for token in ids)

    def finish(self) -> str:
        """The rest, when no more tokens come: U+FFFD for an unfinished character."""
        text = self._tokenizer.decode(self._held, self._skip_special_tokens)
        self._held.clear()
        return text

    def _step(self, token: int) -> str:
        self._held.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer.backend, token)
        except Exception:
            # A decoder that changes its mind about text that is out already, as with a byte
            # that makes the ones before it invalid. What is out stays; start again behind it.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            parts = [self._stream.step(self._tokenizer.backend, held) for held in self._held]
            text = "".join(part for part in parts if part) or None
        if text is None:
            return ""
        self._held.clear()
        return text


class Checked(NamedTuple):
    """What ``StopChecker.feed`` says.

    Attributes:
        text: Text that may go out.
        stop: The stop string that ended the text; None while there is none.
    """

    text: str
    stop: str | None


class StopChecker:
    """Finds stop strings in a growing text.

    Text that could be the beginning of a stop string is held back until that is decided. The
    string that is complete first counts, and of several that end together the longest, so that
    the outcome does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False):
        """Looks for ``stops``, none of them empty; ``include_stop`` leaves it in the text."""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> Checked:
        """Takes the next piece; nothing may be fed after a stop.

        With ``armed`` false (``min_tokens`` not reached) everything passes, and a stop string
        that begins in it is not found.
        """
        text, self._held = self._held + text, ""
        if not self._stops or not armed:
            return Checked(text, None)
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            end, start, stop = min(found)
            return Checked(text[: end if self._include_stop else start], stop)
        undecided = self._undecided_chars(text)
        self._held = text[len(text) - undecided :]
        return Checked(text[: len(text) - undecided], None)

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        text, self._held = self._held, ""
        return text

    def _undecided_chars(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class _GenerationTag(Extension):
    """``{% generation %}``: marks answers for training; for a prompt, a scope like any other."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Turns the block into a scope with the same content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect that templates on the Hugging Face hub are written in."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which would change the prompt.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _token_text(value: object) -> str | None:
    """A special token's text: files have it plain, or inside its description."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_templates(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and sources of chat templates; of equal names the last one counts."""
    for file, content in (
        ("tokenizer_config.json", config),
        ("chat_template.json", _read_json(directory / "chat_template.json")),
    ):
        templates = content.get("chat_template")
        if isinstance(templates, str):
            templates = [{"name": "default", "template": templates}]
        for entry in templates or ():
            if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
                raise ValueError(
                    f"{directory / file}: chat_template must be a string, or a list of objects "
                    f"with name and template; it has {entry!r}"
                )
            yield entry["name"], entry["template"]
    named = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    for path in (*named, directory / "chat_template.jinja"):
        if path.is_file():
            name = "default" if path.name == "chat_template.jinja" else path.stem
            yield name, path.read_text(encoding="utf-8")
