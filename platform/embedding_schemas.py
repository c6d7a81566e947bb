"""The request body of `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from loraplex.engine.api import Pooling
from loraplex.platform.openai_schemas import AdapterChoice, TokenId

MAX_INPUTS = 2048


class EmbeddingBody(AdapterChoice):
    input: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="Text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of the numbers as float32, little endian."
    )
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the first so many numbers, for models trained for it (Matryoshka)."
    )
    pooling: Pooling | None = Field(
        None, description="last: the last token's final hidden state (default); mean: of all."
    )
    normalize: bool | None = Field(None, description="To length 1; default true.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _something_stays(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0:
            raise ValueError("0 would leave nothing of the input; send at least 1, or -1")
        return value
