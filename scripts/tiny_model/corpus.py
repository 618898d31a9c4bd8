"""Documents for training: stories, stories from the middle, and chats, endless and seeded."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import words
from grammar import Scene, choose, invented_name, make_character

BOS, EOS = "<s>", "<|endoftext|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
STORIES_DIR = Path(__file__).parent / "stories"
_ANYONE = ("kid", "animal", "person", "creature")
_RELATIVES = {"family": words.FAMILY, "parent": words.FAMILY[:2], "grandparent": words.FAMILY[2:4]}
_MARKS = "?>&="
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])|\n\n")


@dataclass(frozen=True)
class Plot:
    """One skeleton. `beats` are told in order, one alternative of each."""

    name: str
    hero: tuple[str, ...]
    kinds: tuple[str, ...]
    friend: tuple[str, ...]
    helper: str
    topic: str
    thing: str
    because: str
    weather: bool
    beats: tuple[tuple[str, ...], ...]


def _sections(path: Path) -> Iterator[tuple[str, str]]:
    for section in path.read_text().split("## ")[1:]:
        title, _, body = section.partition("\n")
        yield title.strip(), body


def _lines(name: str) -> dict[str, tuple[str, ...]]:
    return {
        title: tuple(line for line in body.split("\n") if line.strip())
        for title, body in _sections(STORIES_DIR / name)
    }


def _groups(text: str) -> tuple[str, ...]:
    return _ANYONE if text == "any" else tuple(text.split())


def load_plots() -> tuple[Plot, ...]:
    """All plots of stories/plots_*.txt."""
    plots = []
    for path in sorted(STORIES_DIR.glob("plots_*.txt")):
        for title, body in _sections(path):
            name, *pairs = (part.strip() for part in title.split("|"))
            fields = (pair.partition(":") for pair in pairs)
            head = {key.strip(): value.strip() for key, _, value in fields}
            friend = head.get("friend", "none")
            beats = tuple(tuple(block.strip().split("\n")) for block in body.strip().split("\n\n"))
            plots.append(
                Plot(
                    name=name,
                    hero=_groups(head["hero"]),
                    kinds=tuple(head.get("kind", "").split()),
                    friend=() if friend == "none" else _groups(friend),
                    helper=head.get("helper", "none"),
                    topic=head["topic"],
                    thing=head.get("thing", ""),
                    because=head.get("because", ""),
                    weather=head.get("weather") != "no",
                    beats=beats,
                )
            )
    return tuple(plots)


@dataclass(frozen=True)
class Story:
    """A told story and what one may ask for to get it."""

    text: str
    topics: tuple[str, ...]


class Corpus:
    """Generator of documents; the same seed gives the same documents."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.plots = load_plots()
        self.openings = _lines("openings.txt")
        self.chat = _lines("chat.txt")
        self.phrases = _lines("slots.txt")

    def drill(self) -> str:
        """A few words in a random order, again and again.

        Only the first round is a surprise to a model that has learned to look back and copy, which
        is what keeps names and things the same in a story. It has no BOS, so no text begins so.
        """
        pool = (
            words.GIRLS
            + words.BOYS
            + words.SHE_PETS
            + words.HE_PETS
            + words.ANIMALS
            + words.NOUNS["thing"]
        )
        chosen = [self.rng.choice(pool) for _ in range(self.rng.randrange(4, 24))]
        chosen += [
            invented_name(self.rng, self.rng.choice(("he", "she")))
            for _ in range(self.rng.randrange(3))
        ]
        self.rng.shuffle(chosen)
        rounds = max(2, 80 // len(chosen))
        return " ".join(chosen * rounds) + EOS

    def document(self) -> str:
        """A text from BOS to EOS."""
        roll = self.rng.random()
        if roll < 0.54:
            body = self.story().text
        elif roll < 0.66:
            body = self._from_the_middle()
        else:
            return BOS + self._chat()
        return BOS + body + EOS

    def story(self, *, asked: bool = False) -> Story:
        """One story; `asked` makes its first sentence name what the story is about."""
        rng = self.rng
        plot = rng.choice(self.plots)
        scene = self._scene(plot)
        beats = [list(beat) for beat in plot.beats]
        parts: list[str] = []
        if scene.hero is not None:
            start = 0
            if plot.because and rng.random() < 0.15:
                because = scene.fill(plot.because)
                line = rng.choice(self.openings["because"]).replace("{because}", because)
                parts.append(scene.tell(line))
                start = next(i for i, b in enumerate(beats) if ">" in b[0][:2])
                if "{B.intro}" in " ".join(" ".join(b) for b in beats[:start]):
                    start, parts = 0, []
            if not parts:
                parts.append(self._opening(scene, plot, asked))
            beats = beats[start:]
        parts += [scene.tell(line) for line in self._chosen(beats)]
        parts += self._endings(scene) if scene.hero else []
        return Story(self._paragraphs(parts), self._topics(plot, scene))

    def _chosen(self, beats: list[list[str]]) -> Iterator[str]:
        """One alternative per beat, by the marks on its first line.

        `?`: the beat may be left out. `&`: the beats marked `=` after it take the alternative with
        the same number. `>`: a story that began with its trouble goes on here.
        """
        anchor = 0
        for beat in beats:
            marks = beat[0][: len(beat[0]) - len(beat[0].lstrip(_MARKS))]
            if "?" in marks and self.rng.random() < 0.5:
                continue
            index = anchor if "=" in marks else self.rng.randrange(len(beat))
            anchor = index if "&" in marks else anchor
            yield beat[index].lstrip(_MARKS)

    def _scene(self, plot: Plot) -> Scene:
        rng = self.rng
        scene = Scene(rng, phrases=self.phrases)
        if plot.hero[0] not in ("thing", "me"):
            scene.hero = make_character(rng, plot.hero, kinds=plot.kinds)
        if plot.friend:
            scene.friend = make_character(rng, plot.friend, unlike=scene.hero)
        if plot.helper == "elder":
            taken = {who.kind for who in (scene.hero, scene.friend) if who}
            free = [e for e in words.ELDERS if not any(e[1].endswith(kind) for kind in taken)]
            scene.helper = rng.choice(free)
        elif plot.helper in _RELATIVES:
            kind, gender = rng.choice(_RELATIVES[plot.helper])
            scene.helper = (f"{{his}} {kind}", f"{{his}} {kind}", gender)
        if scene.hero is not None:
            scene.slots["home"] = ("", rng.choice(words.HOMES[scene.hero.group]))
        return scene

    def _opening(self, scene: Scene, plot: Plot, asked: bool) -> str:
        rng, hero = self.rng, scene.hero
        assert hero is not None
        lines = self.openings["intro"]
        # Half of the stories open in the few ways that readers will try first.
        lines = lines[:15] if rng.random() < 0.5 else lines
        if asked and hero.group == "kid":
            lines = tuple(line for line in lines if ".intro" in line)
        text = scene.tell(rng.choice(lines))
        if rng.random() < 0.45:
            text += " " + scene.tell(rng.choice(self.openings["trait"]))
        if plot.weather and rng.random() < 0.2:
            text += " " + scene.tell(rng.choice(self.openings["weather"]))
        return text

    def _endings(self, scene: Scene) -> list[str]:
        rng, parts = self.rng, []
        if rng.random() < 0.55:
            name = "ending2" if scene.friend and rng.random() < 0.6 else "ending"
            parts.append(scene.tell(rng.choice(self.openings[name])))
        if rng.random() < 0.15:
            parts.append(scene.tell(rng.choice(self.openings["moral"])))
        if rng.random() < 0.15:
            parts.append("The end.")
        return parts

    def _paragraphs(self, parts: list[str]) -> str:
        if self.rng.random() < 0.3:
            return " ".join(parts)
        text, run = parts[0], 1
        for part in parts[1:]:
            breaks = run >= 2 and self.rng.random() < 0.55
            text += ("\n\n" if breaks else " ") + part
            run = 1 if breaks else run + 1
        return text

    def _topics(self, plot: Plot, scene: Scene) -> tuple[str, ...]:
        rng, hero, friend = self.rng, scene.hero, scene.friend
        if hero is None:
            return (scene.fill(plot.topic),) if plot.thing else ()
        who = f"a {hero.kind}" if rng.random() < 0.6 else hero.introduced(rng)
        if hero.group == "kid" and rng.random() < 0.7:
            who = rng.choice((f"a {hero.kind} named {hero.name}", hero.name))
        who = re.sub(r"\ba ([aeio])", r"an \1", who)
        topics = [who, who, who, who, hero.kind + "s" if hero.group == "animal" else who]
        if friend is not None:
            with_friend = re.sub(r"\ba ([aeio])", r"an \1", f"a {friend.kind}")
            topics += [f"{who} and {with_friend}"]
        topic = scene.fill(plot.topic)
        return (*topics, topic, topic, f"{who} and {topic}")

    def _from_the_middle(self) -> str:
        """A story without its beginning."""
        sentences = _SENTENCE.split(self.story().text)
        start = self.rng.randrange(1, max(2, len(sentences) - 2))
        return " ".join(sentences[start:])

    def _chat(self) -> str:
        rng = self.rng
        roll, turns = rng.random(), []
        if roll < 0.1:
            turns.append(self._small_talk())
        if roll < 0.75:
            turns.append(self._request())
            if rng.random() < 0.12:
                turns.append(self._small_talk("Thank"))
        elif roll < 0.83:
            turns.append(self._small_talk())
        elif roll < 0.91:
            question, answer = rng.choice(self.chat["fact"]).split(" => ")
            turns.append((choose(rng, question), choose(rng, answer)))
        else:
            question = choose(rng, rng.choice(self.chat["unknown"]))
            turns.append((question, choose(rng, rng.choice(self.chat["unknown_answer"]))))
        lines = (f"{USER}\n{ask}\n{ASSISTANT}\n{answer}{EOS}" for ask, answer in turns)
        return "\n".join(lines)

    def _small_talk(self, first: str = "") -> tuple[str, str]:
        lines = [line for line in self.chat["greeting"] if first in line.split(" => ")[0]]
        question, answer = self.rng.choice(lines).split(" => ")
        return choose(self.rng, question), choose(self.rng, answer)

    def _request(self) -> tuple[str, str]:
        rng = self.rng
        story = self.story(asked=True)
        if not story.topics or rng.random() < 0.1:
            return choose(rng, rng.choice(self.chat["request_open"])), story.text
        topic = rng.choice(story.topics)
        ask = choose(rng, rng.choice(self.chat["request"])).replace("{topic}", topic)
        lead = rng.choice(self.chat["lead"]) if rng.random() < 0.25 else "-"
        lead = "" if lead == "-" else lead.strip().replace("{topic}", topic) + " "
        return ask[0].upper() + ask[1:] if rng.random() < 0.9 else ask.lower(), lead + story.text
