"""Texts to vectors, from the base model or an adapter: from a checked body to OpenAI's answer."""

from __future__ import annotations

import base64
import math
import sys
import time
import uuid
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.engine.api import GenerationRequest, SamplingParams
from loraplex.platform.callers import Caller
from loraplex.platform.composition import Composer
from loraplex.platform.embedding_schemas import EmbeddingBody
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.generation import Choice, Generation, TextOptions
from loraplex.platform.inference import Prepared
from loraplex.platform.openai_format import Answer, usage
from loraplex.platform.prompts import encode_prompts, fit
from loraplex.platform.resolution import Resolver
from loraplex.platform.served_model import ServedModel

# Inputs of one request in the engine at once: a large one must not fill its queue.
MAX_PARALLEL = 64


@dataclass(frozen=True, slots=True)
class VectorForm:
    dimensions: int | None
    normalize: bool
    as_base64: bool

    def write(self, raw: bytes) -> list[float] | str:
        """raw: float32, little endian."""
        vector = array("f", raw)
        if sys.byteorder == "big":
            vector.byteswap()
        vector = vector[: self.dimensions]
        length = math.sqrt(math.fsum(value * value for value in vector)) if self.normalize else 1.0
        if length > 0:  # zeros stay zeros
            vector = array("f", (value / length for value in vector))
        if not self.as_base64:
            return vector.tolist()
        if sys.byteorder == "big":
            vector.byteswap()
        return base64.b64encode(vector.tobytes()).decode()


class EmbeddingService:
    def __init__(self, engine: EnginePort, resolver: Resolver) -> None:
        self._engine = engine
        self._composer = Composer(resolver)

    async def prepare(
        self,
        body: EmbeddingBody,
        model: ServedModel,
        caller: Caller,
        sticky_key: str | None = None,
    ) -> tuple[Prepared, VectorForm]:
        """Raises: ApiError."""
        name, composition = await self._composer.compose(body, model, caller, sticky_key)
        size = model.info.hidden_size
        if body.dimensions is not None and size and body.dimensions > size:
            raise ApiError(
                "invalid_request",
                f"dimensions={body.dimensions}: this model's vectors have {size}; ask for at most "
                "that many",
                param="dimensions",
            )
        add_special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [
            fit(prompt, body.truncate_prompt_tokens, model, "input")
            for prompt in await encode_prompts(body.input, model, add_special, param="input")
        ]
        composition = composition.in_prompts([prompt.token_ids for prompt in prompts])
        answer_id = f"embd-{body.request_id or uuid.uuid4().hex}"
        options = TextOptions(keep_empty=True)
        choices = [
            Choice(
                index,
                GenerationRequest(
                    request_id=f"{answer_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=SamplingParams(),
                    adapters=composition.uses(),
                    cache_salt=caller.cache_salt(body.cache_salt or ""),
                    priority=caller.priority(body.priority or 0),
                    tenant=caller.billed,
                    share=caller.share,
                    pooling=body.pooling or composition.defaults.pooling or "last",
                ),
                options,
            )
            for index, prompt in enumerate(prompts)
        ]
        answer = Answer(
            kind="embedding",
            id=answer_id,
            model=name,
            created=int(time.time()),
            adapters=composition.objects(),
            tokenizer=model.tokenizer,
        )
        generation = Generation(self._engine, choices, MAX_PARALLEL)
        prepared = Prepared(caller, answer, generation, composition, False, 1, None)
        form = VectorForm(
            body.dimensions, body.normalize is not False, body.encoding_format == "base64"
        )
        return prepared, form


def written(
    answer: Answer, generation: Generation, vectors: Mapping[int, bytes], form: VectorForm
) -> dict[str, Any]:
    """The whole answer. vectors: by index, one for each input."""
    counted = usage(generation)
    del counted["completion_tokens"]
    return {
        "id": answer.id,
        "object": "list",
        "created": answer.created,
        "model": answer.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": form.write(raw)}
            for index, raw in sorted(vectors.items())
        ],
        "usage": counted,
        **answer.adapter_fields(),
    }
