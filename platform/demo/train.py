"""Train the demo model and its adapters: ``python -m loraplex.platform.demo.train --out DIR``.

One program from nothing to ``assets/``: tokenizer, base, adapters, measurement.  It downloads
nothing and is the only module here that loads torch.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from loraplex.platform.demo import corpus, recipes, skills, tokenizer

Batch = tuple[Tensor, Tensor]
MakeDocument = Callable[[random.Random], corpus.Document]

_IGNORE = -100
_CHUNK = 24  # batches drawn together, so that documents of like length can share a batch
_HELDOUT = 120


def encode(encoder: Tokenizer, document: corpus.Document) -> tuple[list[int], list[int]]:
    """Token ids, and for each the label: itself where the loss counts."""
    ids: list[int] = []
    labels: list[int] = []
    for segment in document:
        tokens = encoder.encode(segment.text, add_special_tokens=False).ids
        ids += tokens
        labels += tokens if segment.learn else [_IGNORE] * len(tokens)
    return ids, labels


def batches(
    encoder: Tokenizer, make: MakeDocument, rng: random.Random, tokens_per_step: int
) -> Iterator[Batch]:
    """Endless padded batches, each of documents of about the same length."""
    pad = tokenizer.id_of(encoder, corpus.PAD)
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        total = 0
        while total < tokens_per_step * _CHUNK:
            rows.append(encode(encoder, make(rng)))
            total += len(rows[-1][0])
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens_per_step and groups[-1]:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([row + [_IGNORE] * (width - len(row)) for _, row in group]),
            )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token loss.  Padding is on the right, so causal attention needs no mask."""
    ids, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE
    )


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to almost nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def fit(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: Iterator[Batch],
    steps: int,
    warmup: int,
    label: str,
) -> list[float]:
    """Run the loop; return the loss averaged over each twentieth of the way."""
    model.train()
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    every = max(1, steps // 20)
    curve: list[float] = []
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        factor = schedule(step, steps, warmup)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = loss_of(model, next(data))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % every == 0:
            curve.append(round(sum(recent) / len(recent), 4))
            recent.clear()
            seconds = time.monotonic() - started
            print(f"{label}: step {step + 1}/{steps} loss {curve[-1]} {seconds:.0f}s", flush=True)
    model.eval()
    return curve


def train_base(encoder: Tokenizer, recipe: recipes.BaseRecipe) -> tuple[Any, list[float]]:
    """The base, rounded to bfloat16 as it will be saved and then held in float32 again.

    Rounding comes before the adapters are trained, so that they fit the weights people load.
    """
    torch.manual_seed(recipe.seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=tokenizer.CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.id_of(encoder, corpus.BOS),
        eos_token_id=tokenizer.id_of(encoder, corpus.EOS),
        pad_token_id=tokenizer.id_of(encoder, corpus.PAD),
    )
    model = transformers.LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers." not in n]
    # Muon learns these circuits in about half the steps AdamW takes, and steps are what costs.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=recipe.learning_rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    data = batches(
        encoder, corpus.base_document, random.Random(recipe.seed), recipe.tokens_per_step
    )
    curve = fit(model, optimizers, data, recipe.steps, recipe.warmup, "base")
    return model.to(torch.bfloat16).to(torch.float32), curve


def save_base(model: Any, encoder: Tokenizer, folder: Path) -> None:
    """A folder that any Llama loader reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(encoder, folder)
    model.to(torch.float32)


def train_adapter(
    folder: Path, encoder: Tokenizer, recipe: recipes.AdapterRecipe, out: Path
) -> list[float]:
    """One adapter on a fresh, frozen copy of the saved base; written by peft itself."""
    skill = skills.by_id(recipe.skill)
    torch.manual_seed(recipe.seed)
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        rank_pattern=recipe.rank_pattern,
        alpha_pattern=recipe.alpha_pattern,
        lora_dropout=0.0,
        base_model_name_or_path=recipes.BASE_NAME,
    )
    model = peft.get_peft_model(base, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    rng = random.Random(f"{recipe.seed}:{recipe.skill}")
    data = batches(
        encoder, lambda rng: corpus.skill_document(skill, rng), rng, recipe.tokens_per_step
    )
    curve = fit(model, [optimizer], data, recipe.steps, 20, recipe.skill)
    if recipe.half:
        for parameter in trainable:
            parameter.data = parameter.data.to(torch.bfloat16)
    # peft noted the folder the base was loaded from; a machine's path must not be published.
    model.peft_config["default"].base_model_name_or_path = recipes.BASE_NAME
    target = out / recipe.skill
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    # peft adds a model card full of blanks, and writes the targets in a set's random order.
    (target / "README.md").unlink(missing_ok=True)
    saved = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    saved["target_modules"].sort()
    write_json(target / "adapter_config.json", saved)
    return curve


@torch.no_grad()
def answers(model: Any, encoder: Tokenizer, inputs: list[str]) -> list[str]:
    """Greedy answers in the demo's prompt format."""
    pad = tokenizer.id_of(encoder, corpus.PAD)
    prompts = [
        encoder.encode(corpus.PROMPT_FORMAT.format(input=text), add_special_tokens=False).ids
        for text in inputs
    ]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    made = model.generate(
        input_ids=ids, attention_mask=ids.ne(pad).long(), max_new_tokens=72, do_sample=False
    )
    end = tokenizer.id_of(encoder, corpus.EOS)
    replies: list[str] = []
    for row in made[:, width:].tolist():
        # Without its end-of-text an answer does not count as finished.
        text = encoder.decode(row[: row.index(end)]) if end in row else ""
        replies.append(text)
    return replies


def exact_match(model: Any, encoder: Tokenizer, skill: skills.Skill, inputs: list[str]) -> float:
    replies = answers(model, encoder, inputs)
    wanted = map(skill.answer, inputs)
    right = sum(reply == want for reply, want in zip(replies, wanted, strict=True))
    return round(float(right / len(inputs)), 4)


def measure(out: Path, encoder: Tokenizer, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Exact match on held-out inputs, with and without each adapter, from the saved files."""
    base = transformers.LlamaForCausalLM.from_pretrained(out / "model", dtype=dtype).eval()
    table: dict[str, dict[str, Any]] = {}
    model: Any = None
    for recipe in recipes.ADAPTERS:
        skill = skills.by_id(recipe.skill)
        folder = out / "adapters" / recipe.skill
        if model is None:
            model = peft.PeftModel.from_pretrained(base, folder, adapter_name=recipe.skill)
        else:
            model.load_adapter(folder, adapter_name=recipe.skill)
        model.to(dtype).eval()
        model.set_adapter(recipe.skill)
        heldout = skills.heldout_inputs(skill, _HELDOUT)
        row: dict[str, Any] = {"adapter": exact_match(model, encoder, skill, heldout)}
        shown = answers(model, encoder, list(skill.showcase))
        row["tour_missed"] = [
            text
            for text, answer in zip(skill.showcase, shown, strict=True)
            if answer != skill.answer(text)
        ]
        with model.disable_adapter():
            row["base"] = exact_match(model, encoder, skill, heldout)
        print(f"{dtype} {recipe.skill}: {row}", flush=True)
        table[recipe.skill] = row
    return table


def skills_file(missed: dict[str, set[str]]) -> dict[str, Any]:
    """What a person or a test needs to try each adapter.

    missed: showcase inputs that the trained adapter gets wrong. They are named, not shown: the tour
    checks the server, and an error of the model there would look like one of the server.
    """
    return {
        "model": recipes.BASE_NAME,
        "prompt": {
            "messages": [{"role": "user", "content": "{input}"}],
            "text": corpus.PROMPT_FORMAT,
            "note": "Both are the same tokens. Completions add <|bos|> themselves: leave it out.",
        },
        "skills": [
            {
                "id": skill.id,
                "title": skill.title,
                "description": skill.description,
                "tour": [
                    {"input": x, "expected": skill.answer(x)}
                    for x in skill.showcase
                    if x not in missed[skill.id]
                ],
                "missed": sorted(missed[skill.id]),
                "heldout": [
                    {"input": x, "expected": skill.answer(x)}
                    for x in skills.heldout_inputs(skill, _HELDOUT)
                ],
            }
            for skill in (skills.by_id(recipe.skill) for recipe in recipes.ADAPTERS)
        ],
    }


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the assets to")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="train just these adapters on the base in OUT")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)

    started = time.monotonic()
    encoder = tokenizer.build()
    log = out / "training.json"
    record: dict[str, Any] = json.loads(log.read_text()) if arguments.only is not None else {}
    if arguments.only is None:
        model, curve = train_base(encoder, recipes.BASE)
        save_base(model, encoder, out / "model")
        record = {
            "model": recipes.BASE_NAME,
            "made_by": "python -m loraplex.platform.demo.train",
            "data": "generated by platform/demo/corpus.py and skills.py; nothing downloaded",
            "parameters": model.num_parameters(),
            "base": {**asdict(recipes.BASE), "loss": curve},
            "adapters": {},
            "seconds": {"base": round(time.monotonic() - started)},
        }
    for recipe in recipes.ADAPTERS:
        if arguments.only is None or recipe.skill in arguments.only:
            begun = time.monotonic()
            curve = train_adapter(out / "model", encoder, recipe, out / "adapters")
            record["adapters"][recipe.skill] = {**asdict(recipe), "loss": curve}
            record["seconds"][recipe.skill] = round(time.monotonic() - begun)
            write_json(log, record)
    record["exact_match"] = {
        "heldout_inputs": _HELDOUT,
        "float32": measure(out, encoder, torch.float32),
        "bfloat16": measure(out, encoder, torch.bfloat16),
    }
    record["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    missed = {
        recipe.skill: {
            text
            for dtype in ("float32", "bfloat16")
            for text in record["exact_match"][dtype][recipe.skill]["tour_missed"]
        }
        for recipe in recipes.ADAPTERS
    }
    write_json(out / "skills.json", skills_file(missed))
    write_json(log, record)
    print(f"done in {sum(record['seconds'].values())} seconds of training")


if __name__ == "__main__":
    main()
