"""From which token of a prompt on an adapter applies. Plain lists, no tensors.

An activated LoRA (aLoRA, 2504.12397) leaves the base model alone up to its *invocation tokens*, a
sequence it was trained to be called by, and applies from the first of them on. So all K/V before
them is the base model's, and a conversation can go from the base to such an adapter and back
without being computed again (`prefix_hash.py`).

As in peft 0.21 (`tuners/lora/variants.py`): the last occurrence in the *prompt* counts, whatever is
generated later; without one the adapter applies to no token at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex.engine.api import AdapterUse


def activation_start(prompt: Sequence[int], invocation_tokens: Sequence[int]) -> int | None:
    """Where the last occurrence of `invocation_tokens` in `prompt` begins; None if there is none.

    Knuth, Morris and Pratt's search, from the end: linear, whatever an adapter asks to look for.
    """
    wanted = invocation_tokens[::-1]
    # fallback[n]: having matched n tokens and no more, so many of them may begin another match.
    fallback = [0, 0]
    for token in wanted[1:]:
        length = fallback[-1]
        while length and wanted[length] != token:
            length = fallback[length]
        fallback.append(length + (wanted[length] == token))
    matched = 0
    for i in range(len(prompt) - 1, -1, -1):
        while matched and prompt[i] != wanted[matched]:
            matched = fallback[matched]
        matched += prompt[i] == wanted[matched]
        if matched == len(wanted):
            return i
    return None


Span = tuple[int, tuple[AdapterUse, ...]]  # first position, what applies from there on


def activation_spans(
    adapters: tuple[AdapterUse, ...],
    prompt: Sequence[int],
    invocations: Mapping[str, Sequence[int]],
) -> tuple[Span, ...]:
    """Which of `adapters` apply to which positions: ascending, the first at 0, the last to the end.

    invocations: invocation tokens by digest, of those that have some. Members of a composition
    begin each at its own place; those not invoked are in no span.
    """
    starts: dict[AdapterUse, int | None] = {
        use: activation_start(prompt, invocations[use.digest]) if use.digest in invocations else 0
        for use in adapters
    }
    cuts = sorted({0, *(start for start in starts.values() if start is not None)})
    return tuple(
        (cut, tuple(u for u, start in starts.items() if start is not None and start <= cut))
        for cut in cuts
    )
