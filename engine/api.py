"""What crosses the boundary between the API process and the engine process, and nothing else.

All structs are frozen and serialise with msgpack. The engine knows tokens and adapter digests;
it knows nothing about text, names, tenants or HTTP. Importing this module must stay cheap: no
torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from loraplex.engine.structs import Raw, Struct


class FinishReason(StrEnum):
    STOP = "stop"  # eos, a stop token or (found by the client side) a stop string
    LENGTH = "length"  # max_tokens or the model's context is used up
    ABORT = "abort"  # cancelled by the caller
    ERROR = "error"  # failed; the output carries `error`


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # the text is a JSON array of strings
    GRAMMAR = "grammar"  # Lark's or GBNF's (EBNF) notation


class Grammar(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an output must look like. `whitespace`: a regular expression of the white space that
    JSON may have between its tokens; "" = none, None = a little.
    """

    kind: GrammarKind
    text: str
    whitespace: str | None = None


class SamplingParams(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How to choose tokens. Values are validated by `engine/validation.py`, not here.

    `temperature == 0` is greedy. `top_k <= 0` and `min_p == 0` and `top_p == 1` switch their
    filter off.
    `logprobs`: None = none, 0 = the chosen token's only, k = also the k most likely.
    `grammar`: the output follows it, and ends when it is complete and the model says so, or when
    nothing can follow; `max_tokens` may cut it. `min_tokens` and `ignore_eos` put the end off for
    as long as the grammar can go on. `allowed_token_ids` holds as well.
    `seed`: same seed, prompt, adapter and parameters give the same tokens whatever shares the
    batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None  # None = as far as the context reaches
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}  # noqa: RUF012 - a copy for each, as in msgspec
    allowed_token_ids: tuple[int, ...] | None = None
    grammar: Grammar | None = None


class AdapterUse(Struct, frozen=True, array_like=True):
    """One member of a request's composition: an adapter (by digest, hex without prefix) and its
    weight.
    """

    digest: str
    weight: float = 1.0


Pooling = Literal["mean", "last"]


class GenerationRequest(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One sequence to generate. `request_id` is unique among live requests. No adapters = the
    base model.

    With `pooling` nothing is generated: its only output carries the mean of the prompt's final
    hidden states (normed, as the output head gets them), or the last of them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    cache_salt: str = ""  # requests share prefix-cache blocks only with equal salts
    priority: int = 0  # lower runs first: each step of it is a head start (`fair_order.py`)
    tenant: str = ""  # whose it is: tenants share the engine fairly
    share: float = 1.0  # the tenant's, relative to others
    pooling: Pooling | None = None
    # What came of it in an engine that died: the output goes on behind these. Counts, penalties,
    # seeds and limits are as if this engine had chosen them.
    output_token_ids: list[int] = []  # noqa: RUF012


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities of one position from the raw logits (before temperature and
    filters).
    """

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top_ids: list[int]
    top_logprobs: list[float]


class ErrorInfo(Struct, frozen=True, array_like=True):
    code: str
    message: str
    kind: str = ""  # the code of its EngineError class, where `code` is more special than that


class SequenceOutput(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """News of one request from one step. Exactly one output per request has a `finish_reason`:
    its last.
    """

    request_id: str
    token_ids: list[int] = []  # noqa: RUF012
    logprobs: list[TokenLogprobs] | None = None  # one entry per new token, when asked for
    # With the first output; entry 0 is None.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended it, if one did (eos excluded)
    # Prompt tokens taken from the prefix cache; with the first output.
    num_cached_tokens: int | None = None
    # Digests of activated LoRAs that the request names and that apply to none of its tokens, since
    # their invocation tokens are not in the prompt; with the first output.
    not_invoked: list[str] = []  # noqa: RUF012
    error: ErrorInfo | None = None  # set exactly when finish_reason is ERROR
    embedding: bytes | None = None  # float32, little endian: of a request with `pooling`
    # Seconds waited before first being scheduled; with the first output.
    queue_s: float | None = None


class ModuleShape(Struct, frozen=True, array_like=True):
    """A module that adapters may change: `path` relative to the causal LM, e.g.
    `model.layers.0.self_attn.q_proj`.

    The weight of a linear module or the head is `[out_features, in_features]`, that of the
    embedding `[in_features, out_features]` (vocabulary, hidden), a norm's `[out_features]`.
    """

    path: str
    in_features: int
    out_features: int
    kind: str = (
        "linear"  # linear (of a layer) | norm (of hidden states) | qk_norm | embedding | head
    )
    bias: bool = False  # whether the base model's module has one
    parts: tuple[int, ...] = ()  # out_features of the projections that a fused one consists of
    tied: bool = False  # of the head: its weight is the embedding's
    weight_digest: str = ""  # of embedding and head: `adapters.digest.ValuesDigest`


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Everything the API process has to know of the model; it never opens the model's directory."""

    name: str  # directory name or hub id, as given
    architecture: str  # e.g. "LlamaForCausalLM"
    dtype: str  # "bfloat16" | "float32" | "float16"
    device: str  # "cpu" | "cuda:0"
    backend: str  # which kernels run: "torch" | "native" | "triton"
    vocab_size: int
    max_model_len: int
    num_layers: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    tokenizer_json: str  # serialised `tokenizers.Tokenizer`
    chat_template: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, pad_token, unk_token as text
    # From generation_config.json: temperature, top_p, top_k...
    generation_defaults: dict[str, float | int]
    modules: list[ModuleShape]  # every module adapters may change
    num_parameters: int
    hidden_size: int = 0  # numbers in an embedding; 0 = not known


class MemoryInfo(Struct, frozen=True, kw_only=True):
    """Bytes, by purpose. `adapter_page_bytes` = one 16-rank page that adapts every module.

    The KV cache and the adapters may share memory and trade it in superblocks: then their totals
    are those of now. Without trading, `superblock_bytes` is 0 and the limits equal the totals.
    """

    weights_bytes: int
    kv_cache_bytes: int
    kv_block_bytes: int
    kv_blocks_total: int
    kv_blocks_used: int  # held by running sequences
    kv_blocks_cached: int  # free to reuse, but still holding a prefix
    block_size: int
    adapter_bytes_total: int
    adapter_bytes_used: int
    adapter_page_bytes: int
    host_adapter_bytes_total: int
    host_adapter_bytes_used: int
    workspace_bytes: int
    device_bytes_total: int  # the machine's memory (RAM on cpu)
    device_bytes_free: int
    superblock_bytes: int = 0
    shared_bytes: int = 0  # of both together
    kv_blocks_min: int = 0  # that adapters can never take
    kv_blocks_max: int = 0
    kv_blocks_obtainable: int = 0  # more of them could be had now, without waiting for anybody
    adapter_bytes_max: int = 0
    adapter_bytes_obtainable: int = 0  # more of them could be had now, without waiting for anybody
    superblocks_to_kv: int = 0  # traded so far
    superblocks_to_adapters: int = 0
    superblocks_lost: int = 0  # that could not be moved; nothing is traded since
    static_because: str = ""  # why nothing is traded


class AdapterState(StrEnum):
    ABSENT = "absent"  # on disk only
    HOST_LOADING = "host_loading"
    HOST = "host"
    DEVICE_LOADING = "device_loading"
    DEVICE = "device"
    DRAINING = "draining"
    FAILED = "failed"


class AdapterResidencyInfo(Struct, frozen=True, kw_only=True):
    digest: str
    state: AdapterState
    rank: int
    pages: int
    device_bytes: int
    host_bytes: int
    running: int  # sequences that use it now
    waiting: int  # queued requests that will
    pinned: bool
    loaded_at: float | None  # unix seconds
    last_used_at: float | None
    hits: int
    loads: int
    evictions: int
    error: str | None = None


class AdapterProbe(Struct, frozen=True, kw_only=True):
    """What an adapter does here, against plain arithmetic on its files (`engine/probe.py`).

    error, base_error, effect: norms of differences of logits, relative to the norm of the logits:
    paged path to reference with the adapter, the same without, and with to without it.
    """

    digest: str
    agrees: bool  # error <= tolerance
    error: float
    tolerance: float
    base_error: float
    effect: float  # 0: the adapter changes nothing


class FreedBytes(Struct, frozen=True, kw_only=True):
    device_bytes: int = 0
    host_bytes: int = 0


class RequestInfo(Struct, frozen=True, kw_only=True):
    request_id: str
    state: str  # "running" | "waiting"
    # "kv" | "slot" | "adapter_loading" | "grammar" | "quota" | None
    waiting_reason: str | None
    digests: list[str]
    prompt_tokens: int
    output_tokens: int
    age_s: float


STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class EngineStats(Struct, frozen=True, kw_only=True):
    """A snapshot, sent about once a second while there is work and on request. Counters only
    grow.
    """

    time: float
    num_running: int
    num_waiting: int
    waiting_by_reason: dict[str, int]
    running_digests: list[str]
    waiting_digests: list[str]
    kv_cache_usage: float  # 0..1
    num_preemptions: int
    prefix_cache_queries: int  # tokens
    prefix_cache_hits: int  # tokens
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_tokens: int
    adapter_loads: int
    adapter_evictions: int
    adapter_load_seconds: float
    adapters_on_device: int
    adapters_on_host: int
    adapter_bytes_used: int
    adapter_bytes_total: int
    adapter_joins: int = 0  # requests that found their load wanted or under way already
    adapter_refusals: int = 0  # requests refused because their adapter failed lately
    step_token_counts: tuple[int, ...] = ()  # steps by tokens: up to each bound, and beyond
    superblocks_to_kv: int = 0  # memory traded between adapters and KV cache
    superblocks_to_adapters: int = 0


# --- messages: API process -> engine process ---


class Submit(Struct, frozen=True, tag="submit"):
    requests: list[GenerationRequest]


class Cancel(Struct, frozen=True, tag="cancel"):
    request_ids: list[str]


class Call(Struct, frozen=True, tag="call", omit_defaults=True):
    """A question or order that is answered by one `Answer` with the same `call_id`.

    Methods: "memory" -> MemoryInfo, "stats" -> EngineStats, "requests" -> list[RequestInfo],
    "adapters" -> list[AdapterResidencyInfo] (those the engine has state for),
    "load" (digest, wait) -> AdapterResidencyInfo, "evict" (digest, tier, drain, timeout_s) ->
    FreedBytes, "pin" / "unpin" (digest) -> AdapterResidencyInfo, "forget" (digest, force,
    timeout_s): evict from every tier, refuse new requests for it -> FreedBytes, "keep" (digest):
    take a "forget" that is under way back -> bool, whether there was one,
    "probe" (digest, timeout_s) -> AdapterProbe; loads it first,
    "reset_prefix_cache" -> bool.
    """

    call_id: int
    method: str
    digest: str = ""
    tier: str = "device"
    wait: bool = True
    drain: bool = False
    force: bool = False
    timeout_s: float | None = None


class Shutdown(Struct, frozen=True, tag="shutdown"):
    pass


ToEngine = Submit | Cancel | Call | Shutdown

# --- messages: engine process -> API process ---


class Progress(Struct, frozen=True, tag="progress"):
    """Start-up news for a progress bar."""

    phase: str
    done: int
    total: int


class Ready(Struct, frozen=True, tag="ready"):
    model: ModelInfo
    memory: MemoryInfo


class Failed(Struct, frozen=True, tag="failed"):
    """Start-up failed, for good; the process exits after it."""

    error: ErrorInfo


class Outputs(Struct, frozen=True, tag="outputs"):
    """All news of one step in one message."""

    outputs: list[SequenceOutput]


class Stats(Struct, frozen=True, tag="stats"):
    stats: EngineStats


class AdapterEvent(Struct, frozen=True, tag="adapter_event", omit_defaults=True):
    """One transition of an adapter's residency."""

    digest: str
    before: AdapterState
    after: AdapterState
    seconds: float  # time spent in `before`
    time: float
    detail: str = ""
    # Of one that left the device "room", "order" or "deleted"; of one that failed, the code.
    reason: str = ""
    # Of one that came to the device: seconds by phase of the load ("queue", "read", "verify",
    # "build", "copy"), from the first want of it on.
    phases: dict[str, float] = {}  # noqa: RUF012


class Answer(Struct, frozen=True, tag="answer", omit_defaults=True):
    """`result` is the msgpack of the method's result type; exactly one of result and error is
    set.
    """

    call_id: int
    result: Raw = Raw(b"\xc0")
    error: ErrorInfo | None = None


class Heartbeat(Struct, frozen=True, tag="heartbeat"):
    time: float
    steps: int


FromEngine = Progress | Ready | Failed | Outputs | Stats | AdapterEvent | Answer | Heartbeat
