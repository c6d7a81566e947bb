"""The engine's settings: frozen, validated on construction, no torch, no environment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
# (sequences, tokens) of a step. A GPU's matrix units want about a thousand rows, and a step of 2048
# tokens delays the decodes beside it by tens of milliseconds at most.
STEP_SIZES = {"cpu": (64, 512), "cuda": (256, 2048)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What `loraplex serve` tells the engine process. None = choose from the model and the machine.

    Raises: ValueError naming the setting, its value and the way out.
    """

    model: str  # a Hugging Face directory or hub id
    adapter_dir: Path  # root of the content-addressed adapter store
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None  # tokens, prompt + output
    max_num_seqs: int | None = None  # sequences in one step
    max_num_batched_tokens: int | None = None  # tokens in one step (chunked prefill)
    max_num_waiting: int = 4096  # requests queued before new ones are refused
    block_size: int = 16  # tokens per KV block
    kv_cache_memory: int | None = None  # bytes
    adapter_memory: int | None = None  # bytes of device memory for adapter pages
    host_adapter_memory: int | None = None  # bytes of host memory for adapters that left the device
    gpu_memory_utilization: float = 0.9
    enable_prefix_cache: bool = True
    num_threads: int | None = None
    backend: str = "auto"  # kernels: "auto" | "torch" | "native" (compiled C++) | "triton"
    # The same request gives bitwise the same logits whatever shares its steps. Costs speed.
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        def refuse(name: str, why: str) -> None:
            raise ValueError(f"{name}={getattr(self, name)!r}: {why}")

        if self.device not in DEVICES:
            refuse("device", f"must be one of {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            refuse("dtype", f"must be one of {', '.join(DTYPES)}")
        for name in ("max_num_waiting", "block_size"):
            if getattr(self, name) < 1:
                refuse(name, "must be at least 1")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory",
            "adapter_memory",
            "num_threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                refuse(name, "must be at least 1, or left out to be chosen automatically")
        if self.host_adapter_memory is not None and self.host_adapter_memory < 0:
            refuse("host_adapter_memory", "must be 0 (no host tier) or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            refuse("gpu_memory_utilization", "must be in (0, 1]")
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            refuse(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({seqs}): every running sequence needs one token "
                "a step",
            )

    def for_device(self, kind: str) -> EngineConfig:
        """With the step sizes that nobody chose taken from the device. kind: "cpu" or "cuda"."""
        seqs, tokens = STEP_SIZES[kind]
        if self.max_num_seqs is not None:
            seqs, tokens = self.max_num_seqs, max(tokens, self.max_num_seqs)
        elif self.max_num_batched_tokens is not None:
            seqs = min(seqs, self.max_num_batched_tokens)
        if self.max_num_batched_tokens is not None:
            tokens = self.max_num_batched_tokens
        return replace(self, max_num_seqs=seqs, max_num_batched_tokens=tokens)

    @property
    def step_sizes(self) -> tuple[int, int]:
        """Sequences and tokens of a step at most, once they are chosen."""
        assert self.max_num_seqs is not None, "`for_device` chooses it"
        assert self.max_num_batched_tokens is not None, "`for_device` chooses it"
        return self.max_num_seqs, self.max_num_batched_tokens
