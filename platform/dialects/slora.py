"""S-LoRA's `/generate`, as its benchmark client speaks it (S-LoRA: 2311.03285)."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from loraplex.platform.callers import Caller
from loraplex.platform.dialects.tgi_schemas import GenerateBody as TgiBody
from loraplex.platform.dialects.tgi_schemas import completion_body
from loraplex.platform.responses import GenerationResponse
from loraplex.platform.runtime import Runtime


class Parameters(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    do_sample: bool = False
    ignore_eos: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    stop_sequences: list[str] | None = None


class GenerateBody(BaseModel):
    """`lora_dir` is an adapter of the registry, as elsewhere; null is the base model."""

    model_config = ConfigDict(extra="ignore")

    inputs: Annotated[str, Field(min_length=1)]
    lora_dir: str | None
    parameters: Parameters = Field(default_factory=Parameters)

    def as_tgi(self) -> dict[str, Any]:
        p = self.parameters
        sampled = {"temperature": p.temperature, "top_p": p.top_p, "top_k": max(0, p.top_k)}
        parameters = {
            "adapter_id": self.lora_dir,
            "max_new_tokens": p.max_new_tokens,
            "do_sample": p.do_sample,
            "ignore_eos_token": p.ignore_eos,
            "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty,
            "stop": p.stop_sequences,
            **(sampled if p.do_sample else {}),
        }
        return {"inputs": self.inputs, "parameters": parameters}


async def respond(body: GenerateBody, state: Runtime, who: Caller) -> Response:
    completion = completion_body(TgiBody.model_validate(body.as_tgi()))
    prepared = await state.inference.prepare_completion(completion, state.served_model(), who)
    return _SloraResponse(prepared, state.generation_ended)


class _SloraResponse(GenerationResponse):
    async def _answer(self) -> Any:
        generation = self._prepared.generation
        text = ""
        async with aclosing(generation.deltas()) as deltas:
            async for _, chunk in deltas:
                text += chunk.text
        return {"generated_text": [text], "count_output_tokens": generation.num_tokens}
