"""Prometheus metrics, made from one status snapshot at each scrape. Labels hold ids only: never text of a prompt."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tided.api.plane import Plane
from tided.model.deployments import Canary, CanaryState
from tided.model.errors import Unavailable
from tided.model.status import EngineStatus, PoolStatus, Status
from tided.model.verification import VerificationState

CONTENT_TYPE = CONTENT_TYPE_LATEST


async def exposition(plane: Plane) -> bytes:
    """The text format. While Redis is away it still answers, with `tided_redis_connected 0` and nothing else of the plane's."""
    try:
        status = await plane.status()
    except Unavailable:
        status = None
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Snapshot(status))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, status: Status | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge("redis_connected", "1 while Redis answers.", status is not None and status.redis == "connected")
        if status is None:
            return
        yield _gauge("leader", "1 while this tided holds the lease.", status.leader)
        yield _gauge("epoch", "Fencing number of this leader.", status.epoch)
        yield _gauge("problems", "Problems that `tidectl status` names.", len(status.problems))
        yield _gauge("engines", "Engines with a live heartbeat.", len(status.engines))
        yield _gauge("workers", "Workers with a live heartbeat.", len(status.workers))
        yield _gauge("drafts", "Draft versions stored.", status.drafts)
        jobs = GaugeMetricFamily("tided_jobs", "Jobs queued or running.", labels=("kind", "state"))
        counts: dict[tuple[str, str], int] = {}
        for job in status.active_jobs:
            key = (job.spec.kind.value, job.state.value)
            counts[key] = counts.get(key, 0) + 1
        for key, count in sorted(counts.items()):
            jobs.add_metric(key, count)
        yield jobs
        yield from _pools(status.pools)
        yield _canaries(status.canaries)
        yield from _engines(status.engines)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tided_{name}", text, value=float(value))


def _pools(pools: tuple[PoolStatus, ...]) -> Iterator[Metric]:
    domains = GaugeMetricFamily("tided_pool_domains", "Domains whose draft is kept.", labels=("target",))
    present = GaugeMetricFamily("tided_pool_domain", "Number of the present domain; 0: not known.", labels=("target",))
    reserve = GaugeMetricFamily("tided_pool_reserve_rows", "Rows kept to be replayed.", labels=("target", "domain"))
    for pool in pools:
        domains.add_metric((pool.target,), len(pool.domains))
        present.add_metric((pool.target,), next((d.number for d in pool.domains if d.present), 0))
        for domain in pool.domains:
            reserve.add_metric((pool.target, str(domain.number)), domain.reserve_rows)
    yield from (domains, present, reserve)


def _canaries(canaries: tuple[Canary, ...]) -> Metric:
    info = GaugeMetricFamily(
        "tided_canary_info",
        "1 for the state of a target's newest canary.",
        labels=("target", "engine", "version", "state"),
    )
    for canary in canaries:
        for state in CanaryState:
            labels = (canary.target, canary.engine, canary.version[:12], state.value)
            info.add_metric(labels, float(canary.state is state))
    return info


def _engines(engines: tuple[EngineStatus, ...]) -> Iterator[Metric]:
    gauges = {
        "running_requests": "Requests in the running batch.",
        "waiting_requests": "Requests waiting.",
        "tokens_per_second": "Tokens generated a second, recently.",
        "acceptance_length": "Tokens a speculative step emits, bonus token included, recently.",
        "acceptance_probability": "Conditional acceptance probability (alpha).",
        "acceptance_short": "Short EMA of acceptance (Algorithm 1).",
        "acceptance_long": "Long EMA of acceptance (Algorithm 1).",
        "training_rows": "Stored rows that the next training would use.",
        "training_rows_needed": "Stored rows at which training starts.",
        "sample_stream_bytes": "Sample bytes in Redis, not acknowledged.",
        "capturing": "1 while the tap is on.",
    }
    families = {
        name: GaugeMetricFamily(f"tided_engine_{name}", text, labels=("engine",)) for name, text in gauges.items()
    }
    gamma = GaugeMetricFamily("tided_engine_gamma", "Drafted tokens by batch size.", labels=("engine", "batch"))
    predicted = GaugeMetricFamily(
        "tided_engine_predicted_speedup", "Eq. 5 at that gamma, by batch size.", labels=("engine", "batch")
    )
    draft = GaugeMetricFamily("tided_engine_draft_info", "The served draft.", labels=("engine", "draft", "version"))
    tested = GaugeMetricFamily(
        "tided_engine_self_test", "1 for the state of the engine's self-test.", labels=("engine", "state")
    )
    rows = CounterMetricFamily("tided_engine_sample_rows", "Rows by what became of them.", labels=("engine", "fate"))
    flight = GaugeMetricFamily("tided_engine_sample_rows_in_flight", "Rows on their way.", labels=("engine",))
    counters = {
        "drifts": CounterMetricFamily("tided_engine_drifts", "Drifts seen.", labels=("engine",)),
        "trainings": CounterMetricFamily("tided_engine_trainings", "Trainings started.", labels=("engine",)),
        "swaps": CounterMetricFamily("tided_engine_swaps", "Drafts swapped in.", labels=("engine",)),
    }
    for engine in engines:
        name = engine.info.engine
        for key, value in _values(engine).items():
            if value is not None:
                families[key].add_metric((name,), value)
        for batch, value in enumerate(engine.speculation.gammas, 1):
            gamma.add_metric((name, str(batch)), value)
        for batch, value in enumerate(engine.speculation.predicted, 1):
            predicted.add_metric((name, str(batch)), value)
        draft.add_metric((name, engine.draft, engine.info.version[:12]), 1.0)
        if engine.verification is not None:
            for state in VerificationState:
                tested.add_metric((name, state.value), engine.verification.state is state)
        for fate in ("tapped", "stored", "shed", "lost", "duplicated", "skipped", "unknown", "purged"):
            rows.add_metric((name, fate), getattr(engine.samples, fate))
        flight.add_metric((name,), engine.samples.in_flight)
        counters["drifts"].add_metric((name,), engine.training.drifts)
        counters["trainings"].add_metric((name,), engine.training.trainings)
        counters["swaps"].add_metric((name,), engine.swaps)
    yield from (*families.values(), gamma, predicted, draft, tested, rows, flight, *counters.values())


def _values(engine: EngineStatus) -> dict[str, float | None]:
    return {
        "running_requests": engine.running,
        "waiting_requests": engine.waiting,
        "tokens_per_second": engine.tokens_per_s,
        "acceptance_length": engine.accept_length,
        "acceptance_probability": engine.speculation.alpha,
        "acceptance_short": engine.training.short,
        "acceptance_long": engine.training.long,
        "training_rows": engine.training.rows,
        "training_rows_needed": engine.training.rows_needed,
        "sample_stream_bytes": engine.samples.stream_bytes,
        "capturing": engine.info.capturing,
    }
