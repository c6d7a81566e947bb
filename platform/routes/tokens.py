"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from loraplex.platform.callers import Caller
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.token_service import DetokenizeBody, TokenizeBody

router = APIRouter(tags=["inference"])

State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, state: State, who: Who) -> dict[str, Any]:
    """The token ids of a prompt, or of messages as the chat template writes them."""
    return await state.tokens.tokenize(body, state.served_model(), who)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, state: State, who: Who) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    return await state.tokens.detokenize(body, state.served_model(), who)
