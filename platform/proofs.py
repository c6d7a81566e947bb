"""Every content is proven once in every kind of engine: its probe is ordered in the background, one
at a time, and what comes of it is kept in the registry.

An adapter is probed where that takes no memory from others: on the device already, or while there
is free room for it. A probe that disagrees takes the adapter out of service; it was in service
until then. Knows nothing of tensors: `engine/probe.py` does the arithmetic.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from importlib.metadata import version

from loraplex.adapters.errors import AdapterCorrupt, AdapterNotFound
from loraplex.adapters.store import AdapterStore
from loraplex.engine.api import AdapterProbe, AdapterState
from loraplex.engine.errors import EngineDead, EngineError
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.models import Proof, utc_now
from loraplex.platform.names import adapter_not_found
from loraplex.platform.proof_view import flags, proof_object
from loraplex.platform.repositories import AuditRepository, ProofRepository
from loraplex.platform.resolution import Resolver
from loraplex.platform.schemas import Verification

log = logging.getLogger(__name__)

ACTOR = "probe"  # in the audit log
LOOK_AGAIN_S = 5.0  # for those that wait for room, or for the engine
PROBE_TIMEOUT_S = 60.0  # to come to the device
VERIFY_TIMEOUT_S = 300.0
DRAIN_TIMEOUT_S = 10.0
# A probe that fails may have killed the engine: the next try is far enough off to serve meanwhile.
FIRST_DELAY_S = 20.0
LONGEST_DELAY_S = 3600.0
# Rests between probes, times the last one: they take at most a fifth of an idle engine's time, and
# of a busy one's so little that less than 1 % of its tokens wait for one.
REST = 4.0
BUSY_REST = 200.0
LONGEST_REST_S = 30.0


@dataclass(slots=True)
class _Room:
    """What the device has, as of one moment."""

    present: frozenset[str]
    bytes_free: int
    page_bytes: int

    def takes(self, digest: str, pages: int) -> bool:
        """No other adapter has to leave for it."""
        return digest in self.present or pages * self.page_bytes <= self.bytes_free


@dataclass(frozen=True, slots=True)
class _Delay:
    seconds: float
    until: float  # on the monotonic clock


class ProofService:
    """For one event loop. `run` is its background; `wake` says that there may be work."""

    def __init__(
        self, db: Database, store: AdapterStore, engine: EnginePort, resolver: Resolver
    ) -> None:
        self._db = db
        self._store = store
        self._engine = engine
        self._resolver = resolver
        self._work = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._delays: dict[str, _Delay] = {}

    def wake(self) -> None:
        """Adapters may have come; first of all when the model is known."""
        self._work.set()

    async def run(self) -> None:
        """Until cancelled. With nothing to prove it sleeps."""
        await self._work.wait()
        while True:
            self._work.clear()
            try:
                some_left = await self._prove_all()
            except EngineDead:
                some_left = True
            except Exception:  # of the registry: uploads and requests tell of it, too
                log.exception("proving_failed")
                some_left = True
            try:
                async with asyncio.timeout(LOOK_AGAIN_S if some_left else None):
                    await self._work.wait()
            except TimeoutError:
                pass

    async def counts(self) -> dict[str, int]:
        """Versions by outcome, for the metrics."""
        async with self._db.read() as session:
            return await ProofRepository(session).counts()

    async def verify(self, caller: Caller, text: str, *, accept: bool) -> Verification:
        """Hash the files again and probe again. accept: serve it even if the probe disagrees.

        Raises: ApiError(adapter_not_found | alias_is_split | permission_denied); EngineError if it
        cannot be probed.
        """
        if accept:
            caller.check_operator("serving an adapter whose probe disagrees")
        adapter = await self._resolver.find(caller, text)
        caller.check_may_change(adapter.tenant, f"adapter {adapter.name!r}")
        digest = adapter.digest
        damage = await asyncio.to_thread(self._damage, digest)
        probe = None
        if damage is None:
            async with self._one_at_a_time:
                probe = await self._engine.probe(digest, timeout_s=VERIFY_TIMEOUT_S)
        else:
            await self._unload(digest)
        proof = await self._record(digest, probe, damage=damage, accept=accept, actor=caller.actor)
        if proof is None:  # deleted meanwhile
            raise adapter_not_found(text)
        return Verification(
            id=adapter.name,
            version=adapter.version,
            digest=f"sha256:{digest}",
            ok=damage is None and not proof.is_refused,
            damage=damage,
            proof=proof_object(proof),
        )

    # --- in the background ------------------------------------------------------------------------

    async def _prove_all(self) -> bool:
        """One pass over what is unproven. Returns whether some of it has to wait.

        Raises: EngineDead, also while the engine restarts.
        """
        async with self._db.read() as session:
            unproven = await ProofRepository(session).unproven(self._facts())
        if not unproven:
            self._delays.clear()
            return False
        some_left, room = False, await self._room()
        for digest, pages in unproven.items():
            if self._work.is_set():
                return True  # newer ones come first
            delay = self._delays.get(digest)
            delayed = delay is not None and time.monotonic() < delay.until
            if delayed or not room.takes(digest, pages):
                some_left = True
                continue
            began = time.monotonic()
            some_left |= not await self._prove(digest)
            await self._rest(time.monotonic() - began)
            room = await self._room()
        return some_left

    async def _prove(self, digest: str) -> bool:
        """Returns whether that was settled."""
        try:
            async with self._one_at_a_time:
                probe = await self._engine.probe(digest, timeout_s=PROBE_TIMEOUT_S)
        except EngineError as error:
            async with self._db.read() as session:
                if not await ProofRepository(session).versions(digest):
                    return True  # deleted meanwhile
            self._put_off(digest, error)
            if isinstance(error, EngineDead):
                raise
            return False
        self._delays.pop(digest, None)
        await self._record(digest, probe, damage=None, accept=False, actor=ACTOR)
        return True

    async def _rest(self, probe_s: float) -> None:
        """The longer rest ends when the engine has nothing to do."""
        await asyncio.sleep(REST * probe_s)
        until = time.monotonic() + min(BUSY_REST * probe_s, LONGEST_REST_S)
        while time.monotonic() < until and (await self._engine.stats()).num_running:
            await asyncio.sleep(min(probe_s * REST, 1.0))

    def _put_off(self, digest: str, error: EngineError) -> None:
        last = self._delays.get(digest)
        seconds = FIRST_DELAY_S if last is None else min(2 * last.seconds, LONGEST_DELAY_S)
        self._delays[digest] = _Delay(seconds, time.monotonic() + seconds)
        log.warning(
            "probe_failed",
            extra={
                "digest": digest,
                "code": error.code,
                "reason": error.message,
                "again_in_s": seconds,
            },
        )

    async def _room(self) -> _Room:
        residents = await self._engine.adapters()
        memory = await self._engine.memory()
        return _Room(
            present=frozenset(r.digest for r in residents if r.state is AdapterState.DEVICE),
            bytes_free=memory.adapter_bytes_total - memory.adapter_bytes_used,
            page_bytes=memory.adapter_page_bytes,
        )

    def _facts(self) -> dict[str, str]:
        """What a proof holds for, as columns of `Proof`."""
        info = self._engine.info
        assert info is not None, "a ready engine knows its model"
        return {
            "model": info.name,
            "device": info.device,
            "dtype": info.dtype,
            "backend": info.backend,
            "release": version("loraplex"),
        }

    # --- files ------------------------------------------------------------------------------------

    def _damage(self, digest: str) -> str | None:
        """Reads every byte."""
        try:
            self._store.verify(digest)
        except AdapterNotFound:
            return f"the files of {digest[:12]} are gone"
        except AdapterCorrupt as error:
            return error.message
        return None

    async def _unload(self, digest: str) -> None:
        """Nothing that was made from damaged files is to be used again."""
        try:
            await self._engine.evict(digest, tier="host", drain=True, timeout_s=DRAIN_TIMEOUT_S)
        except EngineError as error:
            log.warning("unload_failed", extra={"digest": digest, "reason": error.message})

    # --- results ----------------------------------------------------------------------------------

    async def _record(
        self,
        digest: str,
        probe: AdapterProbe | None,
        *,
        damage: str | None,
        accept: bool,
        actor: str,
    ) -> Proof | None:
        """None if no version has this content any more. probe: None leaves the last one's."""
        async with self._db.unit_of_work() as session:
            proofs = ProofRepository(session)
            versions = await proofs.versions(digest)
            if not versions:
                return None
            proof = await proofs.of(digest)
            before = _outcome(proof)
            proof.damage = damage
            if probe is not None:
                self._write(proof, probe)
                if accept or probe.agrees:
                    proof.accepted_error = None if probe.agrees else proof.error
            after = _outcome(proof)
            if before != after:
                for row in versions:
                    AuditRepository(session, row.adapter.tenant).add(
                        actor,
                        f"adapter.proof.{after}",
                        f"{row.adapter.name}@{row.version}",
                        before={"proof": before},
                        after={"proof": after, "damage": damage}
                        | {name: getattr(proof, name) for name in _NUMBERS},
                    )
        self._resolver.forget()
        self._tell(proof, [f"{row.adapter.name}@{row.version}" for row in versions])
        return proof

    def _write(self, proof: Proof, probe: AdapterProbe) -> None:
        for name in _NUMBERS:
            value = getattr(probe, name)
            setattr(proof, name, value if math.isfinite(value) else None)
        for name, value in self._facts().items():
            setattr(proof, name, value)
        proof.agrees, proof.probed_at = probe.agrees, utc_now()

    def _tell(self, proof: Proof, references: list[str]) -> None:
        fields = {"adapter": ",".join(references), "digest": proof.digest}
        numbers = {name: getattr(proof, name) for name in _NUMBERS}
        if proof.damage is not None:
            log.error("adapter_damaged", extra={**fields, "reason": proof.damage})
        elif proof.is_refused:
            log.error("adapter_disproved", extra=fields | numbers)
        elif flags(proof):
            log.warning("adapter_flagged", extra=fields | numbers | {"flags": flags(proof)})


_NUMBERS = ("error", "tolerance", "base_error", "effect")


def _outcome(proof: Proof) -> str:
    """sound: as an adapter should be, or not known to be otherwise."""
    if proof.damage is not None:
        return "damaged"
    if proof.is_refused:
        return "disproved"
    return "accepted" if proof.probed_at is not None and not proof.agrees else "sound"
