"""What transformers + peft answer: adapters made by peft, and their greedy tokens.

A program of its own, since it imports torch: `python -m loraplex.platform.bench.soak.reference`. It
writes every adapter into a folder of its own, and what each of them, each composition and the base
model say to each prompt into `reference.json`.

Tokens count only as far as they are beyond doubt: where the best logit leads the second by less
than `MARGIN`, another order of additions may choose the other, so the reference ends before it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from loraplex.platform.bench.soak.world import NUM_KINDS, TOKEN_ROWS

MARGIN = 1e-3
NUM_TOKENS = 8
# Of A and B: large enough that every adapter says something else than the base model.
SCALE = 0.2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Taken in turn; every round of them has ranks of its own from RANKS. The first add a product to
# weights and nothing else (world.NUM_ADDITIVE of them), so compositions are made of those.
KINDS: tuple[dict[str, Any], ...] = (
    {"target_modules": LINEAR},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": LINEAR, "use_rslora": True},
    {"target_modules": r".*\.(o_proj|down_proj)"},
    {"target_modules": LINEAR, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": LINEAR, "use_dora": True},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    {"target_modules": ["v_proj"], "trainable_token_indices": TOKEN_ROWS},
    {"target_modules": LINEAR, "bias": "all"},
    {"target_modules": ["k_proj", "o_proj", "up_proj"], "lora_bias": True},
)
assert len(KINDS) == NUM_KINDS, "world.py counts them, since it must not import torch"
RANKS = (4, 8, 16, 24, 40)


def recipe(index: int) -> dict[str, Any]:
    """Of the adapter with this index, as arguments of `LoraConfig`."""
    rank = RANKS[(index + index // len(KINDS)) % len(RANKS)]
    return {"r": rank, "lora_alpha": 2 * rank, **KINDS[index % len(KINDS)]}


def make_adapter(base: Any, index: int, seed: int, folder: Path) -> Any:
    """A random adapter, saved into `folder`; returns its PeftModel."""
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **recipe(index))
    model = get_peft_model(copy.deepcopy(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _train(name, parameter, draw)
    model.eval().save_pretrained(str(folder))
    return model


def _train(name: str, parameter: Tensor, draw: torch.Generator) -> None:
    """Move what such an adapter has of its own, in place, as training would; nothing else."""

    def noise() -> Tensor:
        return torch.randn(parameter.shape, generator=draw) * SCALE

    if "lora_magnitude" in name:
        parameter.mul_(1 + noise())
    elif "lora_" in name:
        parameter.copy_(noise())
    elif parameter.requires_grad:  # rows of tokens, a whole module, a bias of the base model
        parameter.add_(noise())


def composed(base: Any, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """The base model plus the weighted sum of what peft says each adapter adds to its weights.

    Not by peft's `add_weighted_adapter`, which scales a composition that begins with an rsLoRA
    adapter by another rule than the adapter itself.
    """
    model = copy.deepcopy(base)
    for folder, weight in zip(folders, weights, strict=True):
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        with torch.no_grad():
            for name, module in adapted.base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    delta = module.get_delta_weight("default")
                    model.get_submodule(name).weight.add_(delta, alpha=weight)
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens beyond doubt, at most NUM_TOKENS a prompt. Prompts of one length run at once."""
    found: list[list[int]] = [[] for _ in prompts]
    for group in _by_length(prompts):
        ids = torch.tensor([prompts[i] for i in group])
        sure = torch.ones(len(group), dtype=torch.bool)
        cache = None
        for _ in range(NUM_TOKENS):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[:, -1].float().topk(2)
            sure &= best.values[:, 0] - best.values[:, 1] > MARGIN
            ids = best.indices[:, :1]
            _append(found, group, ids, sure)
    return found


def _by_length(prompts: list[list[int]]) -> Iterator[list[int]]:
    for length in sorted({len(prompt) for prompt in prompts}):
        yield [i for i, prompt in enumerate(prompts) if len(prompt) == length]


def _append(found: list[list[int]], group: list[int], ids: Tensor, sure: Tensor) -> None:
    for row, i in enumerate(group):
        if sure[row]:
            found[i].append(int(ids[row, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: lists of token ids.")
    parser.add_argument(
        "--compositions", default="[]", help="JSON: lists of [index of an adapter, weight]."
    )
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    base = transformers.AutoModelForCausalLM.from_pretrained(str(args.model), dtype=torch.float32)
    base.eval()
    prompts = json.loads(args.prompts.read_text())
    folders = [args.out / f"content-{i:03d}" for i in range(args.adapters)]
    adapters = [
        greedy(make_adapter(base, i, 1000 * args.seed + i, folder), prompts)
        for i, folder in enumerate(folders)
    ]
    compositions = [
        greedy(composed(base, [folders[i] for i, _ in members], [w for _, w in members]), prompts)
        for members in json.loads(args.compositions)
    ]
    (args.out / "reference.json").write_text(
        json.dumps(
            {"base": greedy(base, prompts), "adapters": adapters, "compositions": compositions}
        )
    )


if __name__ == "__main__":
    main()
