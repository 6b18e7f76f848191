"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from thresher.serve.model import Model

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 4, 16, 64, 128, 256, 1024, 4096, 16384)


class Metrics:
    """Counters of one server."""

    def __init__(self, model: Model) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "thresher_requests", "Inference requests by HTTP status.", ["status"], registry=self._registry
        )
        self.seconds = Histogram(
            "thresher_request_seconds", "Seconds from the head of a request to its response.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.rows = Histogram("thresher_request_rows", "Samples of a request.", buckets=_ROWS, registry=self._registry)
        self.at_work = Gauge("thresher_requests_at_work", "Requests at work now.", registry=self._registry)
        for name, what, value in (
            ("ready", "1 where a version is served.", lambda: model.version is not None),
            ("loaded", "When the version was loaded, in seconds since 1970.", lambda: _loaded(model)),
            ("bytes", "Bytes of the version's files.", lambda: _bytes(model)),
            ("switches", "Versions that were loaded.", lambda: model.switches),
            ("failures", "Versions that were refused.", lambda: model.failures),
        ):
            Gauge(f"thresher_model_{name}", what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


def _loaded(model: Model) -> float:
    return model.version.loaded if model.version else 0


def _bytes(model: Model) -> int:
    return model.version.tables.total_bytes if model.version else 0
