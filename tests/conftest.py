"""Tiny random models of every family and peft adapters for them, made on the fly.

torch and transformers are imported inside: tests that do not ask for a model do not pay for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if not Path("/dev/nvidiactl").exists():
    # Without a GPU the Triton kernels run in their interpreter; read when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
VOCAB_SIZE = 272  # 256 bytes, the special tokens, and some ids no text has

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "phi3": {"sliding_window": 24},
}
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 16, "target_modules": _LINEAR},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": _LINEAR[:4]},
    "rank24": {"r": 24, "lora_alpha": 24, "target_modules": _LINEAR[3:]},
    "patterns": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 20, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"v_proj": 24, "layers.0.self_attn.o_proj": 2},
    },
    "layer0": {
        "r": 33,
        "lora_alpha": 33,
        "target_modules": ["k_proj", "up_proj"],
        "layers_to_transform": [0],
    },
}


def _fused(settings: Any) -> Any:
    """The same adapter for a model with q, k and v in one projection, gate and up in another."""
    if isinstance(settings, dict):
        return {_fused(key): _fused(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return sorted({_fused(value) for value in settings})
    if isinstance(settings, str):
        head, dot, name = settings.rpartition(".")
        return head + dot + _FUSED.get(name, name)
    return settings


def _tokenizer() -> Any:
    """Bytes as tokens: any text goes in and comes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos, eos, pad = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **config) -> directory`: random weights, none at its default."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(family: str = "llama", *, dtype: str = "float32", **changes: Any) -> Path:
        key = repr((family, dtype, sorted(changes.items())))
        if key in made:
            return made[key]
        config = AutoConfig.for_model(family, **{**_BASE, **_OF_FAMILY[family], **changes})
        torch.manual_seed(len(made))
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.25)
                if "norm" in name:
                    parameter.add_(1.0)
        directory = tmp_path_factory.mktemp(f"tiny-{family}")
        model.to(getattr(torch, dtype)).save_pretrained(directory)
        _tokenizer().save_pretrained(directory)
        made[key] = directory
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """`tiny_adapters(model) -> {name: directory}`: six made by peft, with a B that is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: dict[Path, dict[str, Path]] = {}

    def make(model: Path) -> dict[str, Path]:
        if model in made:
            return made[model]
        root = tmp_path_factory.mktemp("adapters")
        for seed, (name, settings) in enumerate(_ADAPTERS.items()):
            base = AutoModelForCausalLM.from_pretrained(model)
            if base.config.model_type == "phi3":
                settings = _fused(settings)
            adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
            torch.manual_seed(100 + seed)
            with torch.no_grad():
                for key, parameter in adapted.named_parameters():
                    if "lora_" in key:
                        parameter.normal_(std=0.12)
            adapted.save_pretrained(root / name)
        made[model] = {name: root / name for name in _ADAPTERS}
        return made[model]

    return make


@pytest.fixture(scope="session")
def store_adapters() -> Callable[[Path, Path, dict[str, Path]], dict[str, str]]:
    """`store_adapters(store root, model directory, {name: folder}) -> {name: digest}`."""
    import shutil

    from loraplex.adapters.intake import inspect
    from loraplex.adapters.store import AdapterStore
    from loraplex.engine.model_config import read_model_config

    def put(root: Path, model: Path, adapters: dict[str, Path]) -> dict[str, str]:
        store, modules = AdapterStore(root), read_model_config(model).modules()
        digests = {}
        for name, folder in adapters.items():
            with store.staging() as staging:
                for file in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copy(folder / file, staging.path / file)
                manifest = inspect(staging.path, modules)
                store.commit(staging, manifest)
            digests[name] = manifest.digest
        return digests

    return put
