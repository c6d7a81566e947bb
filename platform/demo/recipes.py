"""How each adapter is shaped and trained, and how the base is.

The shapes differ on purpose: a server must batch ranks, scalings and target sets that have
nothing in common, and these adapters are what it is shown with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BASE_NAME = "loraplex-demo"
ATTENTION_QV: tuple[str, ...] = ("q_proj", "v_proj")
ATTENTION: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR: tuple[str, ...] = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class BaseRecipe:
    """The model's shape and its training schedule."""

    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    seed: int = 20240607
    steps: int = 2400
    tokens_per_step: int = 2048
    learning_rate: float = 4e-3
    warmup: int = 60


@dataclass(frozen=True)
class AdapterRecipe:
    """One adapter's ``LoraConfig`` in short, and its training schedule."""

    skill: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    half: bool = False  # save in bfloat16
    steps: int = 200
    tokens_per_step: int = 1536
    learning_rate: float = 6e-3
    seed: int = 7


BASE = BaseRecipe()

ADAPTERS: tuple[AdapterRecipe, ...] = (
    AdapterRecipe("reverse", 8, 16, ATTENTION_QV),
    AdapterRecipe("spell", 4, 8, ATTENTION_QV),
    AdapterRecipe("rot13", 16, 16, ALL_LINEAR, rslora=True, half=True, learning_rate=3e-3),
    AdapterRecipe("no-vowels", 4, 8, ALL_LINEAR),
    AdapterRecipe("plural", 8, 16, ALL_LINEAR),
    AdapterRecipe("pig-latin", 16, 32, ATTENTION, half=True),
    AdapterRecipe("iso-date", 16, 32, ATTENTION_QV, half=True),
    AdapterRecipe(
        "digits",
        8,
        16,
        ALL_LINEAR,
        rank_pattern={"q_proj": 16, "down_proj": 4},
        alpha_pattern={"q_proj": 32, "down_proj": 4},
    ),
    AdapterRecipe("kv-json", 32, 32, ALL_LINEAR, rslora=True, half=True, learning_rate=3e-3),
)
