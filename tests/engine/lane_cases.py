"""Adapters of every format beyond A and B, made and run by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": LINEAR},
    "dora of some": {
        "r": 20,
        "lora_alpha": 8,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    },
    "biases of B": {"r": 8, "lora_alpha": 16, "lora_bias": True, "target_modules": LINEAR},
    "saved modules": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["k_proj", "gate_proj", "o_proj", "down_proj"],
    },
    "saved norms": {
        "r": 8,
        "target_modules": ["q_proj"],
        "modules_to_save": ["model.norm", "input_layernorm", "post_attention_layernorm"],
    },
    "saved tables": {
        "r": 8,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "LoRA of the tables": {
        "r": 24,
        "lora_alpha": 36,
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
    },
    "no pages at all": {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {
        "r": 8,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 17, 40, 41, 100, 255],
    },
    "several": {
        "r": 8,
        "lora_alpha": 16,
        "use_dora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": ["o_proj", "input_layernorm", "lm_head"],
        "trainable_token_indices": [3, 17, 40, 41, 100, 255],
    },
}
WITH_BIASES: dict[str, dict[str, Any]] = {  # of models that have any
    "all biases": {"r": 8, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "own biases": {
        "r": 8,
        "bias": "lora_only",
        "use_dora": True,
        "target_modules": ["q_proj", "o_proj"],
    },
}
LINEAR_IN_WEIGHT = ("biases of B", "LoRA of the tables", "no pages at all")


def settings_of(family: str) -> dict[str, dict[str, Any]]:
    """All of them on one family; on the others what their biases and tied heads bear on."""
    if family == "qwen2":
        return WITH_BIASES | {name: CASES[name] for name in ("dora", "saved modules")}
    if family == "qwen3":
        names = ("dora of some", "saved norms", "LoRA of the tables", "tokens")
        several = CASES["several"] | {"modules_to_save": ["o_proj", "input_layernorm"]}
        return {name: CASES[name] for name in names} | {"several": several}
    if family == "phi3":
        modules = {"target_modules": ["qkv_proj", "down_proj"], "modules_to_save": ["gate_up_proj"]}
        return {"fused": {"r": 8, "lora_alpha": 16, "use_dora": True, **modules}}
    return CASES


def make(model: Path, settings: dict[str, Any], folder: Path, seed: int) -> None:
    """Let peft save an adapter that changes everything its settings name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name and not name.endswith("bias"):
                parameter.normal_(std=0.12)
            else:
                parameter.add_(0.15 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=False)


class Peft:
    """One adapter on a model of its own, so that none can change another."""

    def __init__(self, model: Path, folder: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(base, folder).eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        found: Tensor = self._model(torch.tensor([token_ids])).logits[0]
        return found

    def continues(self, prompt: list[int], tokens: list[int]) -> bool:
        logits = self.logits(prompt + tokens)
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
