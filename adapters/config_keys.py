"""The keys that peft 0.21 and its forerunners write into `adapter_config.json`, by what they do.

A key in none of the tables is unknown; it is refused unless its value is empty. Newer versions of
PEFT add keys that change the forward pass, and switch them off with null, false or an empty list.
"""

from __future__ import annotations

USED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "base_model_name_or_path",
        "alora_invocation_tokens",
        "use_dora",
        "lora_bias",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)

# Read while training, while creating weights that a file then replaces, or not at all.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",  # PEFT itself drops it from files
        "lora_dropout",  # identity at inference
        "loftq_config",  # these four parametrise `init_lora_weights`, which is judged itself
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_config",  # how training was spread over devices
        "megatron_core",
        "qalora_group_size",  # only read with use_qalora
        "velora_config",  # another backward pass, the same forward
    }
)

# Changes what the forward pass computes. Fine when off; later versions may learn some of them.
REFUSED = {
    "fan_in_fan_out": "the base weights are stored transposed (with nn.Linear, set it to false)",
    "target_parameters": "the adapter targets parameters that are no linear modules",
    "layer_replication": "the adapter expects a model with repeated layers",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes each token to several adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "enable_lora": "a merged linear with some of its parts adapted (loralib) is not supported",
}
# Values of init_lora_weights that leave base weights and forward pass alone. EVA chooses A and the
# ranks from data (the ranks end in rank_pattern), MiCA freezes B: both are plain LoRA afterwards.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# These subtract the initial adapter from the base weights: A and B fit a base nobody else has.
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
