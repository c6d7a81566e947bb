"""A model runner driven by hand, and transformers + peft to compare it with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.manifest import AdapterManifest
from loraplex.adapters.pool import PagePool
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import LoadedAdapter, load_weights
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams
from loraplex.engine.batch import BatchBuilder
from loraplex.engine.build import build_engine
from loraplex.engine.config import EngineConfig
from loraplex.engine.hosted import HostedEngine
from loraplex.engine.lane import Lanes
from loraplex.engine.loader import Checkpoint
from loraplex.engine.model import Decoder, load_decoder
from loraplex.engine.model_config import read_model_config
from loraplex.engine.model_runner import ModelRunner
from loraplex.engine.sampling import Sampler
from loraplex.engine.seams import Schedule, ScheduledSequence, StepSample
from loraplex.engine.sequence import Sequence
from loraplex.kernels.select import select_ops

# `--import-mode=importlib` leaves the folder off sys.path: load the helpers by their file, once.
for _name in (
    "alora_cases",
    "engine_driver",
    "grammar_fakes",
    "engine_fakes",
    "lane_cases",
    "sampling_cases",
):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])

CPU = torch.device("cpu")
BLOCK_SIZE = 16  # the native kernels' tile
MAX_BLOCKS = 8  # of one sequence
MAX_SEQS = 16


@dataclass
class Bench:
    """The runner of one model with all its adapters on the device; each sequence has own blocks."""

    decoder: Decoder
    pool: PagePool
    runner: ModelRunner
    batches: BatchBuilder
    digests: dict[str, str]
    invocations: dict[str, tuple[int, ...]]  # of activated LoRAs, by digest
    numbers: Any = field(default_factory=count)

    def sequence(self, prompt: list[int], adapter: str | None = None, **sampling: Any) -> Sequence:
        uses = () if adapter is None else (AdapterUse(self.digests[adapter]),)
        return self.composed(prompt, uses, **sampling)

    def composed(
        self, prompt: list[int], uses: tuple[AdapterUse, ...], **sampling: Any
    ) -> Sequence:
        number = next(self.numbers)
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        request = GenerationRequest(
            request_id=str(number), prompt_token_ids=prompt, sampling=params, adapters=uses
        )
        seq = Sequence.from_request(
            request,
            seq_id=number,
            arrival_time=0.0,
            max_model_len=BLOCK_SIZE * MAX_BLOCKS,
            eos_token_ids=frozenset(),
            seed=7 if params.seed is None else params.seed,
            invocations=self.invocations,
        )
        # Blocks in falling order: a kernel that takes a table for one run of memory is found out.
        first = (number % MAX_SEQS) * MAX_BLOCKS
        seq.block_table = list(range(first + MAX_BLOCKS - 1, first - 1, -1))
        return seq

    def schedule(self, wanted: Items[tuple[Sequence, int]]) -> Schedule:
        scheduled = [
            ScheduledSequence(
                seq,
                seq.num_computed_tokens,
                num,
                seq.num_computed_tokens + num == seq.num_tokens,
            )
            for seq, num in wanted
        ]
        scheduled.sort(key=lambda s: (not s.is_decode, s.seq.digests))
        return Schedule(
            scheduled=scheduled,
            num_decodes=sum(s.is_decode for s in scheduled),
            num_tokens=sum(s.num_tokens for s in scheduled),
            released_seq_ids=[],
        )

    def step(self, wanted: Items[tuple[Sequence, int]]) -> dict[int, StepSample]:
        """One step; sampled tokens are appended. Returns the samples by `seq_id`."""
        schedule = self.schedule(wanted)
        samples = self.runner.collect(self.runner.launch(schedule))
        for s, sample in zip(schedule.scheduled, samples, strict=True):
            assert (sample.token_id is not None) == s.samples
            s.seq.num_computed_tokens += s.num_tokens
            if sample.token_id is not None:
                s.seq.token_ids.append(sample.token_id)
        return {s.seq.seq_id: x for s, x in zip(schedule.scheduled, samples, strict=True)}

    @torch.inference_mode()
    def logits(self, wanted: Items[tuple[Sequence, int]]) -> dict[int, Tensor]:
        """One step without sampling: the logits of every row, by `seq_id`."""
        schedule = self.schedule(wanted)
        batch = self.batches.build(schedule)
        lane = Lanes(self.pool, self.decoder.lane_model).find(batch.runs)
        hidden = self.decoder.forward(
            batch.token_ids, self.runner.kv_cache, batch.attention, batch.lora, lane=lane
        )
        found, row = {}, 0
        logits = self.decoder.logits(hidden, lane and lane.at(range(len(hidden))))
        for s in schedule.scheduled:
            found[s.seq.seq_id] = logits[row : row + s.num_tokens]
            s.seq.num_computed_tokens += s.num_tokens
            row += s.num_tokens
        return found

    def all_logits(self, sequences: list[Sequence], chunk: int) -> dict[int, Tensor]:
        """Run every sequence to its end in chunks, all of them in each step; `[tokens, vocab]`."""
        parts: dict[int, list[Tensor]] = {seq.seq_id: [] for seq in sequences}
        while any(seq.num_uncomputed_tokens for seq in sequences):
            wanted = [(s, min(chunk, s.num_uncomputed_tokens)) for s in sequences]
            for seq_id, rows in self.logits([(s, n) for s, n in wanted if n]).items():
                parts[seq_id].append(rows)
        return {seq_id: torch.cat(rows) for seq_id, rows in parts.items()}

    def generate(self, sequences: list[Sequence], num_tokens: int, chunk: int) -> list[list[int]]:
        """Let each make `num_tokens` tokens; a decode beside a prefill chunk is a usual step."""
        while open_ := [s for s in sequences if s.num_output_tokens < num_tokens]:
            self.step([(s, min(chunk, s.num_uncomputed_tokens)) for s in open_])
        return [seq.output_token_ids for seq in sequences]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_bench(
    tiny_adapters: Callable[[Path], dict[str, Path]],
    store_adapters: Callable[..., dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Bench]:
    """`make_bench(model directory, backend="torch") -> Bench`, kept for the session.

    adapters: {name: folder}, instead of `tiny_adapters`.
    """
    made: dict[tuple[Any, ...], Bench] = {}

    def make(model: Path, backend: str = "torch", adapters: dict[str, Path] | None = None) -> Bench:
        adapters = tiny_adapters(model) if adapters is None else adapters
        made_for = (model, backend, *adapters.values())
        if made_for in made:
            return made[made_for]
        dtype = torch.float32
        config, ops = read_model_config(model), select_ops(backend, CPU, dtype)
        with Checkpoint(model) as checkpoint:
            decoder = load_decoder(config, checkpoint, ops, dtype, CPU)
        pool = PagePool(config.num_layers, config.module_shapes, 64 << 20, dtype, CPU)
        root = tmp_path_factory.mktemp("store")
        digests = store_adapters(root, model, adapters)
        invocations = {}
        for digest in digests.values():
            loaded = load_weights(AdapterStore(root).path(digest), dtype)
            pool.install(digest, pool.build_image(loaded))
            invocations[digest] = loaded.invocation_tokens
        kv = ops.kv_cache(
            config.num_layers,
            MAX_SEQS * MAX_BLOCKS,
            BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            CPU,
        )
        batches = BatchBuilder(pool, BLOCK_SIZE, MAX_SEQS, MAX_BLOCKS, CPU)
        runner = ModelRunner(decoder, kv, batches, Sampler(config.vocab_size, CPU))
        invocations = {digest: tokens for digest, tokens in invocations.items() if tokens}
        made[made_for] = Bench(decoder, pool, runner, batches, digests, invocations)
        return made[made_for]

    return make


class Reference:
    """transformers + peft, one sequence at a time."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        first = next(iter(adapters))
        self._model: Any = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
        for name, folder in adapters.items():
            if name != first:
                self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int], adapter: str | None) -> Tensor:
        """`[tokens, vocab]`."""
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(torch.tensor([token_ids])).logits[0]
        self._model.set_adapter(adapter)
        return self._model(torch.tensor([token_ids])).logits[0]

    @torch.inference_mode()
    def hidden(self, token_ids: list[int], adapter: str | None) -> Tensor:
        """`[tokens, hidden]`, behind the final norm."""
        inputs = torch.tensor([token_ids])
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(inputs, output_hidden_states=True).hidden_states[-1][0]
        self._model.set_adapter(adapter)
        return self._model(inputs, output_hidden_states=True).hidden_states[-1][0]

    def continues(self, prompt: list[int], tokens: list[int], adapter: str | None) -> bool:
        """Greedy decoding of `prompt` gives `tokens`: each is the likeliest after those before."""
        logits = self.logits(prompt + tokens, adapter)
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.fixture(scope="session")
def make_reference(tiny_adapters: Callable[[Path], dict[str, Path]]) -> Callable[[Path], Reference]:
    made: dict[Path, Reference] = {}

    def make(model: Path) -> Reference:
        if model not in made:
            made[model] = Reference(model, tiny_adapters(model))
        return made[model]

    return make


def prompt_of(length: int, seed: int = 0, vocab_size: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., list[int]]:
    """`make_prompt(length, seed=0)`: random token ids."""
    return prompt_of


@pytest.fixture
def make_driver(
    tiny_model: Any, tiny_adapters: Any, store_adapters: Any, tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """`make_driver(family, adapters=..., **settings) -> engine_driver.Driver`: with tiny adapters,
    or those of the given folders, in its store.
    """
    open_: list[HostedEngine] = []

    def make(model: str | Path, adapters: dict[str, Path] | None = None, **settings: Any) -> Any:
        if isinstance(model, str):
            model = tiny_model(model)
        folders = tiny_adapters(model) if adapters is None else adapters
        digests = store_adapters(tmp_path / "store", model, folders)
        defaults = {
            "model": str(model),
            "adapter_dir": tmp_path / "store",
            "backend": "torch",
            "num_threads": 1,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 24,
            "max_model_len": 128,
            "kv_cache_memory": 16 << 20,
            "adapter_memory": 8 << 20,
        }
        hosted = build_engine(EngineConfig(**{**defaults, **settings}))
        open_.append(hosted)
        return sys.modules["engine_driver"].Driver(hosted, digests)

    yield make
    for hosted in open_:
        hosted.close()


@dataclass(frozen=True)
class Format:
    """An adapter of a format beyond A and B: as peft saved it, as we loaded it, and peft with it.

    The digest is of a store of its own, the same in any.
    """

    folder: Path
    manifest: AdapterManifest
    loaded: LoadedAdapter
    peft: Any


@pytest.fixture(scope="session")
def take_in(
    store_adapters: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, Path], Format]:
    """`take_in(model, folder as peft saved it)`: the way of an upload."""
    store = tmp_path_factory.mktemp("store")

    def take(model: Path, folder: Path) -> Format:
        digest = store_adapters(store, model, {"it": folder})["it"]
        loaded = load_weights(AdapterStore(store).path(digest), torch.float32)
        assert loaded.extras, "an adapter of A and B only"
        manifest = AdapterStore(store).manifest(digest)
        return Format(folder, manifest, loaded, sys.modules["lane_cases"].Peft(model, folder))

    return take


@pytest.fixture(scope="session")
def make_formats(
    tiny_model: Any, take_in: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Format]]:
    """`make_formats(family) -> {name: Format}`, one of each."""
    kept: dict[str, dict[str, Format]] = {}
    cases = sys.modules["lane_cases"]

    def make(family: str) -> dict[str, Format]:
        if family not in kept:
            model, root = tiny_model(family), tmp_path_factory.mktemp("formats")
            kept[family] = {}
            for seed, (name, settings) in enumerate(cases.settings_of(family).items()):
                cases.make(model, settings, root / str(seed), seed)
                kept[family][name] = take_in(model, root / str(seed))
        return kept[family]

    return make
