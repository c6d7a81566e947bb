"""What a soak knows, expects, and found wrong. No HTTP here."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.platform.bench.soak.world import BASE, Composition, Tokens, World

MAX_TOLD = 20  # violations kept in words, MAX_ALIKE of those that begin alike; all are counted
MAX_ALIKE = 3
KIND_CHARS = 40
SHOWN = 6  # tokens of an answer in a message


@dataclass(slots=True)
class Name:
    """One adapter id. Its versions are what the server acknowledged and did not delete since;
    requests and deletions cross, so it may be a little behind.
    """

    id: str
    is_stable: bool  # never deleted: requests for it must not fail
    versions: dict[int, int] = field(default_factory=dict)  # version -> content


class Ledger:
    """Names of adapters, the digest of every content, and violations."""

    def __init__(self, world: World, num_stable: int, num_volatile: int) -> None:
        self.world = world
        self.names = [Name(f"stable-{i:02d}", True) for i in range(num_stable)]
        self.names += [Name(f"soak-{i:02d}", False) for i in range(num_volatile)]
        self.pinned: set[str] = set()
        self.done: Counter[str] = Counter()  # operation and outcome -> count
        self.num_violations = 0
        self.violations: list[str] = []
        self.tokens_checked = 0
        self._alike: Counter[str] = Counter()
        self._digests: dict[str, int] = {}  # digest -> content
        self._of_content: dict[int, str] = {}
        self._registered: dict[tuple[str, int], str] = {}  # every version ever acknowledged
        self._claimed: dict[tuple[str, int], str] = {}  # what answers said a version is

    # --- violations -----------------------------------------------------------------------------

    def wrong(self, what: str) -> None:
        self.num_violations += 1
        kind = " ".join(re.findall(r"[a-z]+", what))[:KIND_CHARS]  # its words, without numbers
        self._alike[kind] += 1
        if self._alike[kind] <= MAX_ALIKE and len(self.violations) < MAX_TOLD:
            self.violations.append(what)

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.wrong(what)

    # --- the registry as it was told ------------------------------------------------------------

    def registered(self, name: Name, content: int, answer: Mapping[str, Any]) -> None:
        """An upload was acknowledged."""
        version, digest = int(answer["version"]), str(answer["digest"])
        known = self._digests.setdefault(digest, content)
        self.expect(known == content, f"contents {known} and {content} have one digest {digest}")
        self._of_content.setdefault(content, digest)
        self.expect(
            self._of_content[content] == digest, f"content {content} has two digests, {digest} now"
        )
        before = self._registered.setdefault((name.id, version), digest)
        self.expect(
            before == digest, f"{name.id}@{version} was {before} and is registered as {digest}"
        )
        name.versions[version] = content

    def digest(self, content: int) -> str | None:
        """None: it was never uploaded."""
        return self._of_content.get(content)

    def content(self, digest: str) -> int | None:
        return self._digests.get(digest)

    def settle_claims(self) -> None:
        """At the end, when every upload's answer is in: did answers name versions as they are?"""
        for (name, version), digest in self._claimed.items():
            actual = self._registered.get((name, version))
            self.expect(
                actual == digest, f"an answer said {name}@{version} is {digest}, it is {actual}"
            )

    # --- answers --------------------------------------------------------------------------------

    def check_answer(
        self, asked: str, adapters: Sequence[Mapping[str, Any]], prompt: int, tokens: Tokens
    ) -> None:
        """Tokens of the adapters that the answer names, held against the reference.

        asked: for messages. tokens: may be more or fewer than the reference has.
        """
        members = []
        for adapter in adapters:
            digest, version = str(adapter["digest"]), int(adapter["version"])
            known = self._claimed.setdefault((str(adapter["id"]), version), digest)
            self.expect(
                known == digest, f"{adapter['id']}@{version} was {known}, now answers as {digest}"
            )
            content = self._digests.get(digest)
            if content is None:  # the upload's answer is still on its way
                self.done["answers of contents not known yet"] += 1
                return
            members.append((content, float(adapter.get("weight", 1.0))))
        answers = self.world.answers.get(Composition(tuple(members)))
        if answers is None:
            self.wrong(f"{asked}: answered by {members}, which nobody asked for")
            return
        length = min(len(tokens), len(answers[prompt]))
        self.tokens_checked += length
        if tokens[:length] != answers[prompt][:length]:
            self.wrong(
                f"{asked}: tokens {tokens[:SHOWN]} of prompt {prompt} are not "
                f"{answers[prompt][:SHOWN]} of {members}{self._whose(prompt, tokens)}"
            )

    def _whose(self, prompt: int, tokens: Tokens) -> str:
        """Whether they are another adapter's, which tells a mix-up from noise."""
        owners = [
            "the base model" if composition == BASE else str(composition.members)
            for composition, answers in self.world.answers.items()
            if len(tokens) > 2 and tokens[: len(answers[prompt])] == answers[prompt][: len(tokens)]
        ]
        return f"; they are those of {' or '.join(owners)}" if owners else ""

    # --- choices --------------------------------------------------------------------------------

    def some_name(self, draw: random.Random, *, volatile: bool = False) -> Name | None:
        """One that has a version, as far as is known."""
        names = [n for n in self.names if n.versions and not (volatile and n.is_stable)]
        return draw.choice(names) if names else None

    def some_prompt(self, draw: random.Random, composition: Composition | None) -> int:
        """One with a sure answer, if it is known who will answer."""
        if composition is None:
            return draw.randrange(len(self.world.prompts))
        return draw.choice(self.world.sure(composition))
