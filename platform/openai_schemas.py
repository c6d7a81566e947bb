"""Request bodies of `/v1/completions`, and what chats share with them: OpenAI's fields, vLLM's
extras, our adapter fields.

Unknown fields are accepted and ignored (clients send many); known ones are checked. What this
server cannot do is refused by name, never silently dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from loraplex.engine.api import SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_ADAPTERS = 8
MAX_BAD_WORDS = 256

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**63)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
TokenCount = Annotated[int, Field(ge=0, lt=2**63)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=128)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class AdapterWeight(BaseModel):
    """One member of a composition."""

    model_config = ConfigDict(extra="forbid")

    id: str
    weight: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0


class AdapterChoice(BaseModel):
    """Which adapters, and for whom: what every inference route takes."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="The base model or a reference to an adapter.")
    adapter_id: str | None = Field(
        None, description="An adapter: `id`, `id@version`, `id:alias` or `sha256:...`."
    )
    adapters: Annotated[list[AdapterWeight], Field(max_length=MAX_ADAPTERS)] | None = Field(
        None, description="A weighted composition of adapters, applied at run time."
    )
    lora_path: str | None = Field(None, description="SGLang's name of adapter_id.")
    user: str | None = None

    # Of fields that exclude each other the one that comes later is the one at fault.

    @field_validator("adapters")
    @classmethod
    def _one_way_to_name_adapters(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("adapter_id"):
            raise ValueError("adapter_id and adapters exclude each other; send one of them")
        return value


class GenerationBody(AdapterChoice):
    """What the routes that generate text take."""

    max_tokens: TokenCount | None = None
    temperature: Temperature | None = Field(
        None,
        description="0 = greedy. Default: the model's generation_config, else 1. "
        "So for top_p, top_k, min_p and repetition_penalty.",
    )
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: TokenCount | None = None
    skip_special_tokens: bool | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Keep so many tokens of the prompt's end; -1: as many as the model takes."
    )
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    use_beam_search: bool | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    response_format: dict[str, Any] | None = Field(
        None,
        description="text, json_object, or json_schema with "
        '{"json_schema": {"name": ..., "schema": ...}}.',
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        description="One of json (a schema), json_object, regex, choice, grammar (Lark or GBNF); "
        "with json: whitespace_pattern or disable_any_whitespace.",
    )
    guided_json: dict[str, Any] | str | bool | None = Field(
        None, description="vLLM's older name of structured_outputs.json; so for the others."
    )
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    default_max_tokens: ClassVar[int | None] = None

    @field_validator("stop", mode="before")
    @classmethod
    def _no_stop_is_none(cls, value: Any) -> Any:
        return None if value in ("", []) else value

    @field_validator("stream_options")
    @classmethod
    def _options_of_a_stream(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options needs stream=true")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _something_stays(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("0 would leave nothing of the prompt; send at least 1, or -1")
        return value

    def unsupported(self) -> tuple[str, str] | None:
        """(field, why) of the first thing asked for that this server cannot do."""
        if self.use_beam_search:
            return "use_beam_search", "beam search is not supported"
        if self.stream and self.prompt_logprobs is not None:
            return (
                "prompt_logprobs",
                "prompt_logprobs come with whole answers only; set stream=false",
            )
        return None

    @property
    def num_choices(self) -> int:
        """Choices to answer with, of each prompt."""
        return self.n or 1

    @property
    def num_sampled(self) -> int:
        """Choices to generate, of which the best `num_choices` are kept."""
        return self.num_choices

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def requested_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling(self, defaults: dict[str, float | int], *, choice: int = 0) -> SamplingParams:
        """The engine's parameters. A field that was not sent takes the model's default, then the
        API's.

        Choice i of a seeded request samples with seed + i: the same request gives the same set of
        answers.
        """
        given: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
            or (value := defaults.get(name)) is not None
        }
        if given.get("top_k", 0) < 0:
            given["top_k"] = 0
        seed = self.seed
        if seed is not None and choice:
            seed = (seed + choice + 2**63) % 2**64 - 2**63
        max_tokens = self.requested_max_tokens
        if max_tokens is None:
            max_tokens = self.default_max_tokens
        return SamplingParams(
            **given,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.requested_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=self.logit_bias or {},
            allowed_token_ids=None
            if self.allowed_token_ids is None
            else tuple(self.allowed_token_ids),
        )


class CompletionBody(GenerationBody):
    prompt: str | list[TokenId] | list[list[TokenId]] | list[str] = Field(
        description="Text, token ids, or a list of either."
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None,
        description="Generate so many choices and keep the n with the highest log-probability.",
    )

    default_max_tokens: ClassVar[int | None] = 16

    @field_validator("best_of")
    @classmethod
    def _enough_to_choose_from(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < (info.data.get("n") or 1):
            raise ValueError(f"best_of={value} is less than n={info.data['n']}; raise it")
        return value

    def unsupported(self) -> tuple[str, str] | None:
        if self.suffix:
            return "suffix", "suffix (insertion) is not supported; put all of the text into prompt"
        if self.stream and self.num_sampled > self.num_choices:
            return "best_of", "best_of greater than n cannot be streamed; set stream=false"
        return super().unsupported()

    @property
    def num_sampled(self) -> int:
        return self.best_of or self.num_choices

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs
