"""What a proof means: whether a version may be used, and how clients see it. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraplex.platform.errors import ApiError
from loraplex.platform.models import AdapterVersion, Proof
from loraplex.platform.schemas import ProofObject

Flag = Literal["disagrees", "no_effect"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a version cannot be used."""

    code: str
    reason: str

    def error(self, named: str, param: str | None) -> ApiError:
        return ApiError(self.code, f"adapter {named!r} cannot be used: {self.reason}", param=param)


def refusal(row: AdapterVersion) -> Refusal | None:
    """None for a version that can be used. Being probed is no condition, having failed one is."""
    if row.status != "ready":
        return Refusal("adapter_not_ready", row.error or f"its status is {row.status}")
    proof = row.proof
    if proof is None:
        return None
    if proof.damage is not None:
        return Refusal("adapter_not_ready", f"{proof.damage}; upload it again")
    if proof.is_refused:
        return Refusal(
            "adapter_proof_failed",
            f"its probe disagrees: in this engine ({proof.backend}, {proof.dtype}) its logits are "
            f"{_number(proof.error)} off what its files say, {_number(proof.tolerance)} is "
            f"rounding and its whole effect {_number(proof.effect)}; "
            "`loraplex adapter verify` probes it again, with --accept it is served all the same",
        )
    return None


def proof_object(proof: Proof) -> ProofObject | None:
    if proof.probed_at is None:
        return None
    return ProofObject(
        agrees=bool(proof.agrees),
        error=proof.error,
        tolerance=proof.tolerance,
        base_error=proof.base_error,
        effect=proof.effect,
        accepted=not proof.agrees and proof.is_accepted,
        flags=flags(proof),
        probed_at=int(proof.probed_at.timestamp()),
        device=proof.device or "",
        dtype=proof.dtype or "",
        backend=proof.backend or "",
    )


def flags(proof: Proof) -> list[Flag]:
    """no_effect: the adapter changes no more than rounding does without it."""
    found: list[Flag] = []
    if not proof.agrees:
        found.append("disagrees")
    if proof.effect is not None and proof.effect <= (proof.base_error or 0.0):
        found.append("no_effect")
    return found


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"
