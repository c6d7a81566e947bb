"""One Prometheus scrape: the API process's figures, and the engine's snapshot taken for it.

Names: `vllm:` ones as vLLM exposes them (routers and dashboards know them), `loraplex:` for ours.
Every scrape has a registry of its own, so nothing is global and nothing is registered twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loraplex.engine.api import (
    STEP_TOKEN_BOUNDS,
    AdapterResidencyInfo,
    AdapterState,
    EngineStats,
    MemoryInfo,
)
from loraplex.engine.recovery import Supervision
from loraplex.platform.adapter_series import OTHER, AdapterLabel
from loraplex.platform.histogram import Histogram
from loraplex.platform.request_metrics import HISTOGRAMS, RequestMetrics
from loraplex.platform.residency_log import ResidencyLog
from loraplex.platform.sources.pulls import PullCounters


class EngineSnapshot:
    """What the engine said for this scrape; all None or empty while it is away."""

    def __init__(
        self,
        stats: EngineStats | None = None,
        memory: MemoryInfo | None = None,
        adapters: Sequence[AdapterResidencyInfo] = (),
        names: dict[str, AdapterLabel] | None = None,
    ) -> None:
        self.stats = stats
        self.memory = memory
        self.adapters = adapters
        self.names = names or {}  # by digest


class _Exposition(Collector):
    """One scrape."""

    def __init__(
        self,
        model_name: str,
        ready: bool,
        requests: RequestMetrics,
        engine: EngineSnapshot,
        pulls: PullCounters,
        residency: ResidencyLog,
        proofs: Mapping[str, int],
        supervision: Supervision,
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._ready = ready
        self._requests = requests
        self._engine = engine
        self._pulls = pulls
        self._residency = residency
        self._proofs = proofs
        self._supervision = supervision

    def collect(self) -> Iterable[Metric]:
        yield self._gauge("loraplex:ready", "1 when the engine answers.", int(self._ready))
        yield from self._supervision_families()
        yield from self._request_families()
        yield from self._adapter_families()
        yield from self._pull_families()
        yield from self._residency.families(self._labels)
        yield self._proof_family()
        if self._engine.stats is not None:
            yield from self._stats_families(self._engine.stats)
        yield from self._residency_families()
        if self._engine.memory is not None:
            yield from self._memory_families(self._engine.memory)

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _supervision_families(self) -> Iterable[Metric]:
        seen = self._supervision
        yield self._counter(
            "loraplex:engine_restarts", "Engine processes that replaced one.", seen.restarts
        )
        yield self._counter(
            "loraplex:requests_resumed", "Requests that went on in another engine.", seen.resumed
        )
        yield self._gauge(
            "loraplex:adapters_quarantined",
            "Adapters whose requests engines died of, refused until loaded by hand.",
            len(seen.quarantined),
        )

    def _request_families(self) -> Iterable[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for name, (help_text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", help_text, labels=names)
            self._requests.histograms[name].add_to(family, values)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests by how they ended.",
            labels=[*names, "finished_reason"],
        )
        for outcome, count in sorted(self._requests.finished.items()):
            success.add_metric([*values, outcome], count)
        yield success
        yield self._counter(
            "vllm:admission_rejections",
            "Requests refused because the queue was full.",
            self._requests.rejections,
        )

    def _adapter_families(self) -> Iterable[Metric]:
        labels = ["model_name", "adapter", "version"]
        requests = CounterMetricFamily("loraplex:adapter_requests", "Requests.", labels=labels)
        errors = CounterMetricFamily(
            "loraplex:adapter_errors", "Requests that ended with an error.", labels=labels
        )
        prompt = CounterMetricFamily(
            "loraplex:adapter_prompt_tokens", "Prompt tokens.", labels=labels
        )
        output = CounterMetricFamily(
            "loraplex:adapter_generation_tokens", "Output tokens.", labels=labels
        )
        ttft = HistogramMetricFamily(
            "loraplex:adapter_time_to_first_token_seconds",
            "Time to the first token.",
            labels=labels,
        )
        latency = HistogramMetricFamily(
            "loraplex:adapter_e2e_request_latency_seconds",
            "Time from request to last token, of requests that ended well.",
            labels=labels,
        )
        loads = CounterMetricFamily(
            "loraplex:adapter_loads", "Loads to the device, of adapters it knows.", labels=labels
        )
        model = self._labels["model_name"]
        counted = set()
        for label, series in self._requests.adapters:
            counted.add(label)
            values = [model, *label]
            requests.add_metric(values, series.requests)
            errors.add_metric(values, series.errors)
            prompt.add_metric(values, series.prompt_tokens)
            output.add_metric(values, series.generated_tokens)
            series.ttft.add_to(ttft, values)
            series.latency.add_to(latency, values)
        for info in self._engine.adapters:
            known = self._engine.names.get(info.digest)
            if known in counted:
                loads.add_metric([model, *known], info.loads)
                counted.discard(known)
        return requests, errors, prompt, output, ttft, latency, loads

    def _pull_families(self) -> Iterable[Metric]:
        model = self._labels["model_name"]
        running = GaugeMetricFamily(
            "loraplex:pulls", "Pulls under way.", labels=["model_name", "status"]
        )
        for status, count in self._pulls.running.items():
            running.add_metric([model, status], count)
        ended = CounterMetricFamily(
            "loraplex:pulls_ended", "Pulls by how they ended.", labels=["model_name", "outcome"]
        )
        for outcome, count in sorted(self._pulls.ended.items()):
            ended.add_metric([model, outcome], count)
        received = CounterMetricFamily(
            "loraplex:pulled_bytes", "Bytes that ended pulls brought.", labels=["model_name"]
        )
        received.add_metric([model], self._pulls.bytes_pulled)
        return running, ended, received

    def _proof_family(self) -> Metric:
        family = GaugeMetricFamily(
            "loraplex:adapter_proofs",
            "Adapter versions by what their probe or their verification found.",
            labels=["model_name", "outcome"],
        )
        for outcome, count in self._proofs.items():
            family.add_metric([self._labels["model_name"], outcome], count)
        return family

    def _stats_families(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._gauge(
            "vllm:num_requests_running", "Sequences in the running set.", stats.num_running
        )
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting: capacity = for KV blocks or a place, deferred = for their "
            "adapter or grammar.",
            labels=[*self._labels, "reason"],
        )
        deferred = sum(
            count
            for reason, count in stats.waiting_by_reason.items()
            if reason in ("adapter_loading", "slot", "grammar")
        )
        for reason, count in (("capacity", stats.num_waiting - deferred), ("deferred", deferred)):
            reasons.add_metric([*self._labels.values(), reason], count)
        yield reasons
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", stats.kv_cache_usage
        )
        for name, help_text, value in (
            ("vllm:prompt_tokens", "Prompt tokens computed or cached.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Output tokens.", stats.generation_tokens),
            ("vllm:num_preemptions", "Preempted sequences.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached.", stats.prefix_cache_hits),
            ("vllm:prompt_tokens_cached", "Prompt tokens found cached.", stats.prefix_cache_hits),
            ("loraplex:engine_steps", "Forward passes.", stats.steps),
            ("loraplex:engine_step_tokens", "Tokens of all passes.", stats.step_tokens),
            ("loraplex:adapter_loads_all", "Adapter loads.", stats.adapter_loads),
            (
                "loraplex:adapter_load_joins",
                "Requests that found their adapter's load wanted or under way: one load for all.",
                stats.adapter_joins,
            ),
            (
                "loraplex:adapter_refusals",
                "Requests refused at once because their adapter's load failed lately.",
                stats.adapter_refusals,
            ),
        ):
            yield self._counter(name, help_text, value)
        yield self._traded(stats)
        yield self._step_tokens(stats)
        yield self._sleep_state()
        yield self._gauge(
            "vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", stats.adapters_on_device
        )
        yield self._gauge(
            "vllm:max_gpu_lora_adapters", "Adapters of rank 16 that fit there.", self._room()
        )
        yield self._gauge(
            "vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", stats.adapters_on_host
        )
        yield self._gauge(
            "loraplex:adapter_bytes_used", "Device bytes of adapters.", stats.adapter_bytes_used
        )
        yield self._gauge(
            "loraplex:adapter_bytes_total",
            "Device bytes for adapters.",
            stats.adapter_bytes_total,
        )
        yield self._lora_info(stats)

    def _traded(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "loraplex:memory_superblocks_traded",
            "Superblocks of memory that went from adapters to the KV cache or back.",
            labels=[*self._labels, "to"],
        )
        labels = list(self._labels.values())
        family.add_metric([*labels, "kv_cache"], stats.superblocks_to_kv)
        family.add_metric([*labels, "adapters"], stats.superblocks_to_adapters)
        return family

    def _step_tokens(self, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens per forward pass.", labels=list(self._labels)
        )
        counts = stats.step_token_counts
        histogram = Histogram.of(STEP_TOKEN_BOUNDS, counts, stats.step_tokens)
        histogram.add_to(family, list(self._labels.values()))
        return family

    def _sleep_state(self) -> Metric:
        """Routers skip engines that sleep; this one never does."""
        family = GaugeMetricFamily(
            "vllm:engine_sleep_state",
            "1 for the state the engine is in.",
            labels=[*self._labels, "sleep_state"],
        )
        for state in ("awake", "weights_offloaded", "discard_all"):
            family.add_metric([*self._labels.values(), state], int(state == "awake"))
        return family

    def _lora_info(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = self._engine.names

        def joined(digests: Sequence[str]) -> str:
            return ",".join(sorted({names[digest][0] for digest in digests if digest in names}))

        values = [str(self._room()), joined(stats.running_digests), joined(stats.waiting_digests)]
        family.add_metric(values, stats.time)
        return family

    def _room(self) -> int:
        """Adapters of rank 16 that fit on the device."""
        memory = self._engine.memory
        return memory.adapter_bytes_total // memory.adapter_page_bytes if memory else 0

    def _residency_families(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in memory.",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        levels = {
            AdapterState.DEVICE: "gpu",
            AdapterState.DRAINING: "gpu",
            AdapterState.HOST: "cpu",
        }
        named = {label[0] for label, _ in self._requests.adapters}
        written = set()
        for info in self._engine.adapters:
            name = self._engine.names.get(info.digest, OTHER)[0]
            level = levels.get(info.state)
            if level is None or name not in named or name in written:
                continue  # cardinality stays that of the per-adapter series
            written.add(name)
            family.add_metric([name, level, str(info.pinned).lower(), str(info.rank)], 1)
        return (family,)

    def _memory_families(self, memory: MemoryInfo) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "KV cache configuration.",
            labels=[*self._labels, "block_size", "num_gpu_blocks"],
        )
        family.add_metric(
            [*self._labels.values(), str(memory.block_size), str(memory.kv_blocks_total)], 1
        )
        return (family,)


def exposition(
    model_name: str,
    ready: bool,
    requests: RequestMetrics,
    engine: EngineSnapshot,
    pulls: PullCounters,
    residency: ResidencyLog,
    proofs: Mapping[str, int],
    supervision: Supervision,
) -> CollectorRegistry:
    """A registry that holds this scrape's figures."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(
        _Exposition(model_name, ready, requests, engine, pulls, residency, proofs, supervision)
    )
    return registry
