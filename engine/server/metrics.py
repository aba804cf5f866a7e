"""``/metrics`` for Prometheus: vLLM's names for the engine, DCGM's for GPUs (so their dashboards work), else ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.outputs import RequestOutput
from engine.server.host import EngineHost, NotReadyError
from engine.telemetry.gpu import GpuReading
from engine.telemetry.sampler import TelemetrySampler

# Seconds; vLLM's buckets for time to first token and for the time between tokens.
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)

# Counters of the engine that a scrape reads: (vLLM's or our name, key of EngineStatus.totals, help).
_TOTALS = (
    ("vllm:prompt_tokens", "prompt_tokens", "Prompt tokens of accepted requests."),
    ("vllm:generation_tokens", "output_tokens", "Output tokens generated."),
    ("vllm:num_preemptions", "preemptions", "Requests put back because KV blocks ran out."),
    ("vllm:prefix_cache_queries", "prefix_query_tokens", "Tokens looked up in the prefix cache."),
    ("vllm:prefix_cache_hits", "prefix_hit_tokens", "Tokens found in the prefix cache."),
    ("vllm:spec_decode_num_drafts", "drafts", "Speculative drafts verified."),
    ("vllm:spec_decode_num_draft_tokens", "draft_tokens", "Speculative tokens proposed."),
    ("vllm:spec_decode_num_accepted_tokens", "accepted_tokens", "Speculative tokens accepted."),
)

_MIB = 2.0**-20  # mebibytes in a byte
# Readings of a GPU: (name in DCGM's exporter, key of GpuReading, what one of our units is in DCGM's, help).
_GPU_GAUGES: tuple[tuple[str, str, float, str], ...] = (
    ("DCGM_FI_DEV_GPU_UTIL", "utilization_percent", 1, "GPU utilization (in %)."),
    ("DCGM_FI_DEV_MEM_COPY_UTIL", "memory_utilization_percent", 1, "Memory utilization (in %)."),
    ("DCGM_FI_DEV_FB_USED", "memory_used_bytes", _MIB, "Frame buffer memory used (in MiB)."),
    ("DCGM_FI_DEV_FB_TOTAL", "memory_total_bytes", _MIB, "Frame buffer memory in all (in MiB)."),
    ("DCGM_FI_DEV_GPU_TEMP", "temperature_c", 1, "GPU temperature (in C)."),
    ("DCGM_FI_DEV_POWER_USAGE", "power_w", 1, "Power draw (in W)."),
    ("DCGM_FI_DEV_ENFORCED_POWER_LIMIT", "power_limit_w", 1, "Current power limit (in W)."),
    # a counter, but under DCGM's name, which lacks the ending that this library gives to counters
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "energy_mj", 1, "Energy since the driver was loaded (in mJ)."),
    ("DCGM_FI_DEV_SM_CLOCK", "sm_clock_mhz", 1, "SM clock frequency (in MHz)."),
    ("DCGM_FI_DEV_MEM_CLOCK", "memory_clock_mhz", 1, "Memory clock frequency (in MHz)."),
    ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "clocks_event_reasons", 1, "Why the clocks are what they are (bit mask)."),
)


class RequestMetrics:
    """Histograms and counters of finished requests, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels, registry = ["model_name"], self.registry
        self._ttft = Histogram(
            "vllm:time_to_first_token_seconds",
            "Arrival to first token.",
            labels,
            registry=registry,
            buckets=_TTFT_BUCKETS,
        )
        self._itl = Histogram(
            "vllm:inter_token_latency_seconds",
            "Gaps between successive output tokens.",
            labels,
            registry=registry,
            buckets=_TOKEN_BUCKETS,
        )
        self._tpot = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "(last token - first token) / (output tokens - 1), per request.",
            labels,
            registry=registry,
            buckets=_TOKEN_BUCKETS,
        )
        self._e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to end.", labels, registry=registry, buckets=_LATENCY_BUCKETS
        )
        self._finished = Counter(
            "vllm:request_success", "Finished requests.", [*labels, "finished_reason"], registry=registry
        )
        self.model = ""

    def observe(self, output: RequestOutput) -> None:
        """Take the last output of a request."""
        times = output.times
        self._finished.labels(self.model, output.finish_reason or "unknown").inc()
        if times.end is not None and output.finish_reason in ("stop", "length"):
            self._e2e.labels(self.model).observe(times.end - times.arrival)
        if times.token_times:
            first, last = times.token_times[0], times.token_times[-1]
            self._ttft.labels(self.model).observe(first - times.arrival)
            gaps = self._itl.labels(self.model)
            for earlier, later in pairwise(times.token_times):
                gaps.observe(later - earlier)
            if len(times.token_times) > 1:
                self._tpot.labels(self.model).observe((last - first) / (len(times.token_times) - 1))


class EngineCollector(Collector):
    """Reads gauges and totals from the engine when it is scraped."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client``. Nothing while no model is loaded."""
        try:
            status = self._host.loop.status()
        except NotReadyError:
            return
        used = sum(status.blocks.count(state) for state in "us")
        gauges = (
            ("vllm:num_requests_running", "Requests in the batch.", status.running),
            ("vllm:num_requests_waiting", "Requests that wait for admission.", status.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks held by requests, 0 to 1.", used / status.num_blocks),
            ("headroom:kv_blocks", "KV blocks in all.", status.num_blocks),
            ("headroom:kv_blocks_cached", "Free KV blocks with a reusable prefix.", status.blocks.count("c")),
            ("headroom:weights_bytes", "Resident bytes of the weights.", status.memory.weights),
            ("headroom:resident_bytes", "Memory in use by the worker.", status.memory.resident),
        )
        name = str(status.model["name"])
        for metric, text, value in gauges:
            family = GaugeMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([name], value)
            yield family
        for metric, key, text in _TOTALS:
            counter = CounterMetricFamily(metric, text, labels=["model_name"])
            counter.add_metric([name], status.totals[key])
            yield counter
        yield _accepted_per_position(name, status.speculation["accepted_per_position"])


def _accepted_per_position(model: str, accepted: Sequence[int]) -> Metric:
    text = "Speculative tokens accepted at each position of a draft."
    family = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos", text, labels=["model_name", "position"]
    )
    for position, count in enumerate(accepted):
        family.add_metric([model, str(position)], count)
    return family


class TelemetryCollector(Collector):
    """Gives the newest sample of the machine and of its GPUs; a reading that is unavailable is left out."""

    def __init__(self, telemetry: TelemetrySampler) -> None:
        self._telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client``."""
        sample = self._telemetry.latest().sample
        system = sample["system"]
        yield GaugeMetricFamily("headroom:machine_cpu_percent", "CPU use, 100 is all cores.", system["cpu_percent"])
        yield GaugeMetricFamily(
            "headroom:machine_memory_total_bytes", "Memory of the machine.", system["memory_total_bytes"]
        )
        yield GaugeMetricFamily(
            "headroom:machine_memory_available_bytes", "Memory available.", system["memory_available_bytes"]
        )
        for metric, key, factor, text in _GPU_GAUGES if sample["gpu"] else ():
            yield _gpu_gauge(metric, text, sample["gpu"] or (), key, factor)


def _gpu_gauge(metric: str, text: str, gpus: Sequence[GpuReading], key: str, factor: float) -> Metric:
    family = GaugeMetricFamily(metric, text, labels=["gpu", "UUID", "modelName", "engine"])
    for gpu in gpus:
        value = dict(gpu)[key]
        if isinstance(value, (int, float)):
            own = "true" if gpu["own"] else "false"
            family.add_metric([str(gpu["index"]), gpu["uuid"] or "", gpu["name"] or "", own], value * factor)
    return family


def metrics_router(host: EngineHost, metrics: RequestMetrics, telemetry: TelemetrySampler) -> APIRouter:
    """``GET /metrics``."""
    metrics.registry.register(EngineCollector(host))
    metrics.registry.register(TelemetryCollector(telemetry))
    ProcessCollector(registry=metrics.registry)  # process_resident_memory_bytes, process_cpu_seconds_total …
    router = APIRouter()

    @router.get("/metrics")
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
