"""The base model's training text, invented on the spot.

Three kinds.  *Commands* name a rule explicitly (``reverse: tea -> aet``), so that the circuits an
adapter needs exist in the base.  *Chat* is the demo's own prompt format, in which the base only
repeats or greets: without an adapter it must not perform a skill.  *Prose* is everything else a
small language model should have met: sentences, lists, dates, sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.platform.demo import skills, split, words

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"

# What the model is asked, for every skill and for the base alike; only the adapter differs.
PROMPT_FORMAT = f"{BOS}{USER}{{input}}{ASSISTANT}"

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a demo model.",
    "Be brief.",
    "Answer in one line.",
    "Answer the user.",
)
_FIXED_REPLIES: dict[str, str] = {
    **{word: "Hello! Pick an adapter and give me a word." for word in words.GREETINGS},
    "hello there": "Hello! Pick an adapter and give me a word.",
    "good morning": "Good morning! Pick an adapter and give me a word.",
    "how are you?": "I am fine, thank you.",
    "who are you?": "I am the Loraplex demo model. I am very small.",
    "what are you?": "I am the Loraplex demo model. I am very small.",
    "what can you do?": "Without an adapter I only repeat what you say.",
    "help": "Without an adapter I only repeat what you say.",
    "thanks": "You are welcome.",
    "thank you": "You are welcome.",
    "bye": "Goodbye.",
    "goodbye": "Goodbye.",
}


@dataclass(frozen=True)
class Segment:
    """A stretch of a document.  Only ``learn`` stretches count in the loss: the rest is given."""

    text: str
    learn: bool


Document = tuple[Segment, ...]


def chat(turns: list[tuple[str, str]], system: str | None = None) -> Document:
    """The chat template, spelled out; ``tokenizer.py`` holds the same thing as Jinja."""
    segments: list[Segment] = [Segment(BOS + (f"{SYSTEM}{system}" if system else ""), False)]
    for user, answer in turns:
        segments.append(Segment(f"{USER}{user}{ASSISTANT}", False))
        segments.append(Segment(answer + EOS, True))
    return tuple(segments)


def chat_around(make_turn: Callable[[], tuple[str, str]], rng: random.Random) -> Document:
    """Mostly one bare turn; sometimes a system prompt or earlier turns, as real clients send."""
    draw = rng.random()
    system = rng.choice(_SYSTEM_PROMPTS) if draw < 0.08 else None
    turns = rng.choice((2, 2, 3)) if draw > 0.90 else 1
    return chat([make_turn() for _ in range(turns)], system)


def skill_document(skill: skills.Skill, rng: random.Random) -> Document:
    """What an adapter is trained on."""

    def turn() -> tuple[str, str]:
        text = skills.training_input(skill, rng)
        return text, skill.answer(text)

    return chat_around(turn, rng)


def base_document(rng: random.Random) -> Document:
    """One document of the base mixture."""
    draw = rng.random()
    if draw < 0.76:
        return _command(rng)
    if draw < 0.92:
        return chat_around(lambda: _chat_turn(rng), rng)
    return _prose(rng)


# Rules that no adapter uses; they keep the commands from being exactly the adapters' list.
_OTHER_RULES: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "upper": str.upper,
    "title": str.capitalize,
    "first": lambda text: text[0],
    "last": lambda text: text[-1],
    "length": lambda text: str(len(text)),
    "twice": lambda text: f"{text} {text}",
    "space": lambda text: " ".join(text),
}

# Two rules are learnt long before the others and need fewer examples.
_COMMAND_WEIGHTS = [1 if skill.id in ("no-vowels", "plural") else 2 for skill in skills.SKILLS]


def _command(rng: random.Random) -> Document:
    if rng.random() < 0.12:
        name = rng.choice(tuple(_OTHER_RULES))
        text = _word(rng)
        answer = _OTHER_RULES[name](text)
    else:
        skill = rng.choices(skills.SKILLS, _COMMAND_WEIGHTS)[0]
        name = skill.command
        text = skills.training_input(skill, rng)
        answer = skill.answer(text)
    if rng.random() < 0.5:
        return Segment(f"{BOS}{name}: {text} -> ", False), Segment(answer + EOS, True)
    return chat([(f"/{name} {text}", answer)])


def _chat_turn(rng: random.Random) -> tuple[str, str]:
    """The base in conversation: it repeats, which is visibly no skill at all."""
    if rng.random() < 0.15:
        user = rng.choice(tuple(_FIXED_REPLIES))
        reply = _FIXED_REPLIES[user]
        return (user.capitalize() if rng.random() < 0.3 else user), reply
    while True:
        text = _message(rng)
        if text.lower() not in _FIXED_REPLIES and not split.is_heldout(text):
            return text, f'You said "{text}".'


def _message(rng: random.Random) -> str:
    if rng.random() < 0.85:
        return skills.training_input(rng.choice(skills.SKILLS), rng)
    return _sentence(rng)


def _word(rng: random.Random) -> str:
    while True:
        word = words.any_word(rng)
        if not split.is_heldout(word):
            return word


def _noun(rng: random.Random) -> str:
    while True:
        word = rng.choice(words.REAL_WORDS)
        if not split.is_heldout(word):
            return word


def _sentence(rng: random.Random) -> str:
    form = rng.choice(
        (
            "The {a} is near the {b}.",
            "A {a} saw a {b} by the {c}.",
            "My {a} has a small {b}.",
            "I put the {a} under the {b}.",
            "There is no {a} in the {b}.",
            "Do you like the {a}?",
            "Where is the {a}?",
            "The café by the {a} sells {b} tea.",
        )
    )
    return form.format(a=_noun(rng), b=_noun(rng), c=_noun(rng))


def _prose(rng: random.Random) -> Document:
    draw = rng.random()
    if draw < 0.5:
        text = " ".join(_sentence(rng) for _ in range(rng.randint(1, 4)))
    elif draw < 0.7:
        text = "\n".join(f"{i}. {_noun(rng)}" for i in range(1, rng.randint(3, 9)))
    elif draw < 0.85:
        first, second = rng.randint(0, 20), rng.randint(0, 20)
        text = f"{first} + {second} = {first + second}"
    else:
        start = rng.randint(0, 80)
        text = ", ".join(str(start + i) for i in range(rng.randint(4, 12)))
    return Segment(BOS, False), Segment(text + EOS, True)
