"""What a soak is made of: a tiny random model, adapters of many kinds, prompts, and what each of
them must say.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.platform.bench import models
from loraplex.platform.bench.peer import PeerError

SHAPE = models.LlamaShape("soak", 2, 64, 4, 2, 16, 128, 512, 256, attention_bias=True)
MODEL_SCALE = 0.1
NUM_PROMPTS = 6
SHORT, LONG = 10, 45  # tokens; the long ones begin alike for two blocks of 16
COMMON = 32
# What reference.py makes in turn; importing that would be importing torch. The first kinds only add
# to weights, so compositions are made of those.
NUM_KINDS, NUM_ADDITIVE = 12, 6
TOKEN_ROWS = [5, 9, 400]  # of the embedding, which one kind trains; in every prompt
COMPOSITION_WEIGHTS = ((1.0, 1.0), (0.5, 1.5), (1.0, -0.5), (2.0, 0.25))

FILES = ("adapter_config.json", "adapter_model.safetensors")
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Composition:
    """Contents by index, with weights; one member with weight 1 is the plain adapter."""

    members: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Content:
    """The files of one adapter, as they are uploaded."""

    config: bytes
    weights: bytes
    archive: bytes  # tar.gz of both


class World:
    """prompts: token ids. contents: by index. Answers are as long as they are beyond doubt, which
    may be nothing.
    """

    def __init__(
        self,
        model: Path,
        prompts: Sequence[Tokens],
        contents: Sequence[Content],
        answers: Mapping[Composition, Sequence[Tokens]],
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.contents = contents
        self.answers = answers
        self.compositions = [c for c in answers if len(c.members) > 1]

    def sure(self, composition: Composition) -> list[int]:
        """The prompts that it has an answer to."""
        return [i for i, tokens in enumerate(self.answers[composition]) if tokens]

    def check(self) -> None:
        """Every two say different things, else a mix-up of them would go unseen.

        Raises: PeerError naming two that do not differ.
        """
        said: dict[tuple[tuple[int, ...], ...], Composition] = {}
        for composition, answers in self.answers.items():
            heads = tuple(tuple(tokens[:2]) for tokens in answers)
            if heads in said:
                raise PeerError(f"{composition} and {said[heads]} answer alike; use another --seed")
            said[heads] = composition


def plain(index: int) -> Composition:
    return Composition(((index, 1.0),))


BASE = Composition(())


def make_world(folder: Path, num_contents: int, num_compositions: int, seed: int) -> World:
    """Raises: PeerError when the reference cannot be made."""
    draw = random.Random(f"world-{seed}")
    model = models.write_model(folder / "model", SHAPE, seed, scale=MODEL_SCALE)
    prompts = _prompts(draw)
    made = folder / "contents"
    made.mkdir(exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    additive = [i for i in range(num_contents) if i % NUM_KINDS < NUM_ADDITIVE]
    compositions = [
        list(zip(draw.sample(additive, 2), COMPOSITION_WEIGHTS[i % 4], strict=True))
        for i in range(num_compositions)
    ]
    command = [sys.executable, "-m", "loraplex.platform.bench.soak.reference"]
    command += ["--model", str(model), "--out", str(made), "--adapters", str(num_contents)]
    command += ["--seed", str(seed), "--prompts", str(folder / "prompts.json")]
    command += ["--compositions", json.dumps(compositions)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise PeerError(f"transformers + peft could not make the reference: {tail}")
    found = json.loads((made / "reference.json").read_text())
    answers = {BASE: found["base"]}
    answers |= {plain(i): tokens for i, tokens in enumerate(found["adapters"])}
    for members, tokens in zip(compositions, found["compositions"], strict=True):
        answers[Composition(tuple((i, w) for i, w in members))] = tokens
    contents = [_content(made / f"content-{i:03d}") for i in range(num_contents)]
    world = World(model, prompts, contents, answers)
    world.check()
    return world


def _prompts(draw: random.Random) -> list[Tokens]:
    def some(count: int) -> Tokens:
        return [draw.randrange(3, SHAPE.vocab_size) for _ in range(count)]

    common = [*TOKEN_ROWS, *some(COMMON - len(TOKEN_ROWS))]
    short = [[*some(SHORT - len(TOKEN_ROWS)), *TOKEN_ROWS] for _ in range(NUM_PROMPTS // 2)]
    return short + [common + some(LONG - COMMON) for _ in range(NUM_PROMPTS - len(short))]


def _content(folder: Path) -> Content:
    config, weights = ((folder / name).read_bytes() for name in FILES)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, data in zip(FILES, (config, weights), strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Content(config, weights, packed.getvalue())
