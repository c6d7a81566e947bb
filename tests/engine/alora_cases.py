"""Activated LoRAs made by peft, and peft's own forward to hold them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CALL, CHECK = [7, 8, 9], [11, 12]  # what invokes them
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "call": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "alora_invocation_tokens": CALL},
    "check": {
        "r": 20,
        "lora_alpha": 20,
        "target_modules": LINEAR[:4],
        "alora_invocation_tokens": CHECK,
    },
}


def save_adapters(model: Path, root: Path) -> dict[str, Path]:
    """{name: folder}, saved by peft, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, (name, settings) in enumerate(SETTINGS.items()):
        base = AutoModelForCausalLM.from_pretrained(model)
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(500 + seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.12)
        adapted.save_pretrained(root / name)
    return {name: root / name for name in SETTINGS}


class Peft:
    """transformers + peft, one sequence at a time. It finds the activation by itself."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        first, *others = adapters
        self._model: Any = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
        for name in others:
            self._model.load_adapter(adapters[name], adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logits(self, prompt: list[int], adapter: str | None, offset: int | None = None) -> Tensor:
        """`[tokens, vocab]`. offset: says how many tokens from the end on it is active, instead of
        letting peft search.
        """
        ids = torch.tensor([prompt])
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(ids).logits[0]
        self._model.set_adapter(adapter)
        given = {} if offset is None else {"alora_offsets": [offset]}
        return self._model(ids, **given).logits[0]

    @torch.inference_mode()
    def both(self, prompt: list[int], plain: str, activated: str) -> Tensor:
        """A composition: the layers apply both, the activated one from its tokens on."""
        self._model.set_adapter(activated)  # whose tokens are searched for
        self._model.base_model.set_adapter([plain, activated])
        return self._model(torch.tensor([prompt])).logits[0]

    @torch.inference_mode()
    def generate(self, prompt: list[int], adapter: str | None, num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        how |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 258}
        if adapter is None:
            with self._model.disable_adapter():
                made = self._model.generate(input_ids=ids, **how)
        else:
            self._model.set_adapter(adapter)
            made = self._model.generate(input_ids=ids, **how)
        return made[0, len(prompt) :].tolist()
