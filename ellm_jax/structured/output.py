"""What a request's output has to be: checked for form and size when it is made.

Whether a schema or an expression means something is found out when it is compiled
(`structured.grammars`), which takes longer and needs the model's tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

SOURCE_BYTES_MAX = 256 * 1024
"""Most bytes of a schema, an expression, a grammar, or of all choices together."""

SCHEMA_DEPTH_MAX = 100
"""Most objects and arrays of a JSON schema inside each other. What compiles it counts to 128."""

CHOICES_MAX = 10_000
"""Most choices."""

_REMEDY = "give one of them"


@dataclasses.dataclass(frozen=True)
class StructuredOutput:
    """The form of an output: one of the fields is given, the others are None.

    What is given is kept as text, so that equal forms are equal, hash alike and are compiled once.

    Attributes:
        json_schema: A JSON schema, as a mapping or as text. The properties of an object come in the
            order in which the schema names them. Kept as text.
        regex: A regular expression that the whole output matches. Syntax of Rust's regex crate,
            which has no look-around and no references back.
        grammar: A grammar in the Lark dialect of llguidance, with the rule "start"; or in GBNF,
            which is told by its "::=".
        choice: The output is one of these texts. Kept as a tuple.

    Raises:
        ValueError: none or several fields, text that is empty, too large or too deep, or is no
            JSON; says what to do.
        TypeError: a value of the wrong kind.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing is given"
            raise ValueError(f"structured output by {' or '.join(names)}: {said}; {_REMEDY}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _checked_choices(self.choice))
        else:
            _check_source(given[0], getattr(self, given[0]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Makes one from a mapping such as a parsed JSON object.

        Raises:
            ValueError: a name that does not exist; or as the constructor.
            TypeError: as the constructor.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"unknown form of output {name!r}; known: {', '.join(names)}")
        return cls(**values)

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)


def _schema_text(schema: object) -> str:
    """A JSON schema as compact text, its order kept."""
    if isinstance(schema, str):
        _check_source("json_schema", schema)
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"json_schema is not JSON ({error}); give the schema as a mapping or as its text"
            ) from error
        except RecursionError:
            raise _too_deep() from None
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"json_schema is a {type(schema).__name__}: must be a JSON object, as in "
            '{"type": "object"}'
        )
    _check_depth(schema)
    try:
        text = json.dumps(schema, default=_plain, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema cannot be written as JSON: {error}; change it") from error
    _check_source("json_schema", text)
    return text


def _plain(value: object) -> Any:
    """What JSON has for mappings that are no dicts."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def _check_depth(schema: object) -> None:
    # By hand: whatever recurses would be ended by what it is to find.
    level: list[object] = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, Mapping) else _items(whole))
            if isinstance(part, Mapping | list | tuple)
        ]
        if not level:
            return
        if len(level) > SOURCE_BYTES_MAX:  # as text each takes two bytes; also ends cycles
            raise ValueError(
                f"json_schema has more than {SOURCE_BYTES_MAX} objects and arrays; make it smaller"
            )
    raise _too_deep()


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _too_deep() -> ValueError:
    return ValueError(
        f"json_schema has more than {SCHEMA_DEPTH_MAX} objects and arrays inside each other; name "
        "parts of it in $defs and refer to them with $ref"
    )


def _check_source(name: str, source: object) -> None:
    if not isinstance(source, str):
        raise TypeError(f"{name} is a {type(source).__name__}: must be text")
    if not source.strip() and name != "regex":
        raise ValueError(f"{name} is empty; say what the output has to be, or leave it out")
    _check_bytes(name, source)


def _check_bytes(name: str, source: str) -> None:
    try:
        size_bytes = len(source.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has U+{ord(source[error.start]):04X}, half of a surrogate pair and no "
            "character; take it out"
        ) from error
    if size_bytes > SOURCE_BYTES_MAX:
        raise ValueError(
            f"{name} has {size_bytes} bytes: at most {SOURCE_BYTES_MAX} are allowed; make it "
            "shorter"
        )


def _checked_choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise TypeError(f"choice is a {type(choices).__name__}: must be a list of texts")
    if not choices:
        raise ValueError("choice has no texts; give at least one, or leave it out")
    if len(choices) > CHOICES_MAX:
        raise ValueError(
            f"choice has {len(choices)} texts: at most {CHOICES_MAX} are allowed; use a regular "
            "expression or a grammar"
        )
    for text in choices:
        if not isinstance(text, str):
            raise TypeError(f"choice has {text!r}: must be a text")
        if not text:
            raise ValueError("choice has an empty text; give at least one character")
    _check_bytes("choice", "".join(choices))
    return tuple(choices)
