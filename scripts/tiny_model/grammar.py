"""Stories from templates: characters, slots and choices that stay consistent within one story.

Template language: `[a|b]` is one of the alternatives (they nest), `{toy}` is a word of that
category, the same one throughout the story, `{a:toy}` is it with article and adjective, `{toy+}`
with the adjective only, and `{~toy}` is a fresh word each time. `{A}`, `{B}`, `{C}` are the hero,
the friend and the helper; `{he}`, `{him}`, `{his}` belong to A, `{he2}` to B, `{he3}` to C.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import words

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]+)\}")
_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}
_IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "sheep": "sheep", "deer": "deer",
    "fox": "foxes", "ostrich": "ostriches",
}  # fmt: skip


_GROUP_WEIGHTS = {"kid": 5, "animal": 5, "person": 2, "creature": 2}
_KINDS = {
    "animal": words.ANIMALS,
    "creature": words.CREATURES,
    "pet": words.PETS,
    "giant": ("giant",),
}


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    an = phrase[0].lower() in "aeiou" and not phrase.lower().startswith(("uni", "one"))
    return f"{'an' if an else 'a'} {phrase}"


def plural(noun: str) -> str:
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def choose(rng: random.Random, text: str) -> str:
    """Resolve every `[a|b]`, innermost first."""
    while match := _CHOICE.search(text):
        pick = rng.choice(match.group(1).split("|"))
        text = text[: match.start()] + pick + text[match.end() :]
    return text


@dataclass(frozen=True)
class Character:
    """Who acts. `gender` is "he" or "she"; `name` is empty for "the fox" and the like."""

    kind: str
    name: str
    adjective: str
    gender: str
    group: str

    def described(self) -> str:
        return article(f"{self.adjective} {self.kind}".strip())

    def introduced(self, rng: random.Random) -> str:
        if not self.name:
            return self.described()
        return f"{self.described()} {rng.choice(('named', 'called'))} {self.name}"

    def defined(self, rng: random.Random) -> str:
        """How a story that starts in the middle of things says who it is about."""
        if self.name and self.group == "kid":
            return self.name
        if self.name:
            return f"{self.name} the {rng.choice((self.adjective, ''))} {self.kind}".replace(
                "  ", " "
            )
        return f"the {self.adjective} {self.kind}".replace("  ", " ")

    def again(self, rng: random.Random) -> str:
        """A later mention."""
        if self.name and (self.group == "kid" or rng.random() < 0.95):
            return self.name
        small = self.adjective in ("little", "small", "young", "old")
        return f"the {self.adjective + ' ' if small and rng.random() < 0.25 else ''}{self.kind}"

    def addressed(self) -> str:
        return self.name or self.kind.title()


def invented_name(rng: random.Random, gender: str) -> str:
    """A name that nobody has; those of girls end in "a"."""
    parts = [rng.choice(words.SYLLABLES) for _ in range(rng.choice((1, 2, 2)))]
    end = rng.choice(words.SHE_ENDS if gender == "she" else words.HE_ENDS)
    return ("".join(parts) + end).title()


def make_character(
    rng: random.Random,
    groups: Sequence[str],
    *,
    kinds: Sequence[str] = (),
    unlike: Character | None = None,
) -> Character:
    """A random character of one of the groups; `unlike` gets another kind and another pronoun."""
    group = rng.choices(groups, [_GROUP_WEIGHTS.get(name, 1) for name in groups])[0]
    gender = rng.choice(("he", "she"))
    if unlike is not None:
        gender = "she" if unlike.gender == "he" else "he"
    if group == "kid":
        return _child(rng, gender, unlike)
    if group == "person":
        return _grown_up(rng, kinds, gender if unlike else "")
    return _animal_or_creature(rng, group, gender, kinds, unlike)


def _child(rng: random.Random, gender: str, unlike: Character | None) -> Character:
    names = words.GIRLS if gender == "she" else words.BOYS
    if rng.random() < 0.12:
        names = tuple(invented_name(rng, gender) for _ in range(3))
    name = rng.choice([each for each in names if unlike is None or each != unlike.name])
    adjective = rng.choice(("little", "little", "", *words.CHILD_ADJECTIVES))
    return Character("girl" if gender == "she" else "boy", name, adjective, gender, "kid")


def _grown_up(rng: random.Random, kinds: Sequence[str], gender: str) -> Character:
    people = [who for who in words.PEOPLE if gender in ("", who[1])]
    kind, gender = rng.choice([who for who in people if not kinds or who[0] in kinds])
    adjective = "" if kind.startswith("old") else rng.choice(words.PERSON_ADJECTIVES)
    name = ""
    if rng.random() < 0.4:
        name = rng.choice(words.GIRLS if gender == "she" else words.BOYS)
    return Character(kind, name, adjective, gender, "person")


def _animal_or_creature(
    rng: random.Random, group: str, gender: str, kinds: Sequence[str], unlike: Character | None
) -> Character:
    pool = [kind for kind in kinds or _KINDS[group] if unlike is None or kind != unlike.kind]
    alike = [kind for kind in pool if (kind in words.SHE_KINDS) == (gender == "she")]
    named = group == "pet" or not alike or rng.random() < 0.6
    names = words.SHE_PETS if gender == "she" else words.HE_PETS
    if rng.random() < 0.1:
        names = (invented_name(rng, gender),)
    adjectives = words.CREATURE_ADJECTIVES if group == "creature" else words.ANIMAL_ADJECTIVES
    return Character(
        kind=rng.choice(pool if named else alike),
        name=rng.choice(names) if named else "",
        adjective="big" if group == "giant" else rng.choice(("little", *adjectives)),
        gender=gender,
        group="animal" if group == "pet" else group,
    )


@dataclass
class Scene:
    """What one story remembers: its characters and the words it has drawn."""

    rng: random.Random
    hero: Character | None = None
    friend: Character | None = None
    helper: tuple[str, str, str] | None = None
    slots: dict[str, tuple[str, str]] = field(default_factory=dict)
    phrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    last_fresh: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    introduced: set[str] = field(default_factory=set)

    def tell(self, template: str) -> str:
        """The template with everything filled in, sentences capitalised."""
        return capitalised(self.fill(template))

    def drawn(self, category: str) -> tuple[str, str]:
        """Adjective (may be empty) and noun for a category; drawn once, then remembered."""
        if category not in self.slots:
            if category == "place":
                self.slots[category] = self.rng.choice(words.PLACES)
                return self.slots[category]
            base = category.rstrip("0123456789")
            noun = self._word(base)
            adjectives = words.ADJECTIVES.get(base, ())
            use = bool(adjectives) and " of " not in noun and self.rng.random() < 0.65
            self.slots[category] = (self.rng.choice(adjectives) if use else "", noun)
        return self.slots[category]

    def _word(self, category: str) -> str:
        if category == "animal":
            return self.rng.choice(words.ANIMALS)
        return self.rng.choice(self.phrases.get(category) or words.NOUNS[category])

    def _slot(self, key: str) -> str:
        if key[0] in "ABC" and (len(key) == 1 or key[1] == "."):
            return self._mention(key)
        if pronoun := self._pronoun(key):
            return pronoun
        if key.startswith("~"):
            return self._fresh(key[1:])
        if key.startswith("a:"):
            adjective, noun = self.drawn(key[2:])
            return article(f"{adjective} {noun}".strip())
        if key.startswith(("in:", "to:")):
            return self._place(key)
        if key.endswith("+"):
            return " ".join(self.drawn(key[:-1])).strip()
        if key.endswith(".plural"):
            return plural(self.drawn(key.removesuffix(".plural"))[1])
        return self.drawn(key)[1]

    def _fresh(self, key: str) -> str:
        """A word drawn anew; a trailing 2 names the one drawn last."""
        category, _, form = key.partition(".")
        if category.endswith("2") and category[:-1] in self.last_fresh:
            return self.last_fresh[category[:-1]]
        category = category.rstrip("2")
        word = self._word(category)
        while word in self.used:
            word = self._word(category)
        # Small categories run out of unused words, so forget them now and then.
        self.used = {word} if len(self.used) > 5 else self.used | {word}
        self.last_fresh[category] = word
        return plural(word) if form else word

    def _place(self, key: str) -> str:
        preposition, noun = self.drawn("place")
        return f"{'to' if key.startswith('to:') else preposition} the {noun}"

    def _pronoun(self, key: str) -> str:
        base = key.rstrip("23").lower()
        if base not in _PRONOUNS["he"]:
            return ""
        if key.endswith("3"):
            gender = self.helper[2] if self.helper else "she"
        else:
            who = self.friend if key.endswith("2") else self.hero
            gender = who.gender if who else "he"
        text = _PRONOUNS[gender][base]
        return text.capitalize() if key[0].isupper() else text

    def _mention(self, key: str) -> str:
        """A character by letter and form; the first plain mention of B or C introduces them."""
        letter, _, form = key.partition(".")
        if form in ("", "intro") and letter != "A":
            form = "" if letter in self.introduced else "intro"
        if form in ("intro", "kind", "described"):
            self.introduced.add(letter)
        if letter == "C":
            return self._helper(form)
        who = self.hero if letter == "A" else self.friend
        if who is None:
            raise KeyError(f"{{{key}}}: this plot has no such character")
        forms: dict[str, Callable[[], str]] = {
            "": lambda: who.again(self.rng),
            "intro": lambda: who.introduced(self.rng),
            "described": who.described,
            "def": lambda: who.defined(self.rng),
            "name": who.addressed,
            "kind": lambda: who.kind,
        }
        return forms[form]()

    def _helper(self, form: str) -> str:
        if self.helper is None:
            raise KeyError("{C}: this plot has no helper")
        intro, again, _ = self.helper
        if form == "call":
            return again.rsplit(" ", 1)[-1].capitalize()
        return self.fill(intro if form == "intro" else again)

    def fill(self, template: str) -> str:
        """The template with its slots filled in, as part of a sentence."""
        return _SLOT.sub(lambda m: self._slot(m.group(1)), choose(self.rng, template))


def capitalised(text: str) -> str:
    """Upper case at the start and after a full stop; never inside a broken-off direct speech."""
    text = re.sub(r"\b([Aa]) (?=[aeio]|u[^n]|un[^i])", r"\1n ", text)
    text = re.sub(r"^([\"(]*)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    return re.sub(r"([.!?]\"? )(\"?)([a-z])", _after_stop, text)


def _after_stop(match: re.Match[str]) -> str:
    stop, quote, letter = match.groups()
    # `"Help!" he said`: what follows is a tag, unless the template says otherwise.
    tag = stop[0] in "!?" and '"' in stop and not quote
    return stop + quote + (letter if tag else letter.upper())
