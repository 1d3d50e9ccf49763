"""The server's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blip2.serve.batching_engine import Engine


class Metrics(Collector):
    """One server's metrics: those of its requests, and the numbers of its engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        self._registry.register(self)
        labels = ("route", "status")
        self._requests = Counter("blip2_requests", "requests answered", labels, registry=self._registry)
        about = "from arrival to the answer's end"
        self._seconds = Histogram("blip2_request_seconds", about, ("route",), registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers."""
        engine, cache = self._engine, self._engine.cache
        for family, name, help, value in (
            (GaugeMetricFamily, "waiting", "requests that wait for the model", engine.waiting),
            (GaugeMetricFamily, "running", "texts being generated", engine.running),
            (GaugeMetricFamily, "image_cache_bytes", "bytes of encoded images", cache.bytes),
            (CounterMetricFamily, "steps", "decoding steps", engine.steps),
            (CounterMetricFamily, "tokens", "tokens generated, all beams counted", engine.tokens),
            (CounterMetricFamily, "image_cache_hits", "images whose encoding was in the cache", cache.hits),
            (CounterMetricFamily, "image_cache_misses", "images whose encoding was not in it", cache.misses),
        ):
            yield family(f"blip2_{name}", help, value)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
