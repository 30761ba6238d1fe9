"""Metrics for Prometheus: what the service has done since its start. No label holds text."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from clinora.serving.activity import Activity

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus's text format
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16)

# Why a request was refused, by the status of its answer.
REFUSALS = {
    400: "host",
    401: "unauthorized",
    403: "forbidden",
    413: "too_large",
    415: "invalid",
    422: "invalid",
    429: "logins",  # too many attempts, unless the rate limit was reached
    503: "busy",
}
RATE_LIMIT = "rate_limit"
OWN_ADAPTER = ""  # of the run; Prometheus treats an empty label as a missing one
# No valid HTTP; too slow; too many connections, or the service is ending.
CONNECTION_STATUSES = (400, 408, 503)


class Metrics:
    """The counters of one service, in a registry of their own.

    Attributes:
        batch_sizes: Histogram of the notes in a batch.

    Args:
        model: The model, as ``/v1/model`` describes it.
    """

    def __init__(self, model: dict) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "clinora_requests", "HTTP requests", ["route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "clinora_request_seconds", "Time from a request to the end of its response", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._events = Counter(
            "clinora_events", "Events of the page", ["event", "status"], registry=registry
        )
        self._event_seconds = Histogram(
            "clinora_event_seconds", "Time from the request for an event to the event's end",
            ["event"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._notes = Counter("clinora_notes", "Notes in requests and events", registry=registry)
        self._predictions = Counter(
            "clinora_predictions", "Notes classified, by adapter and predicted class",
            ["adapter", "label"], registry=registry,
        )  # fmt: skip
        self._referred = Counter(
            "clinora_referred", "Notes classified and referred to a person, by adapter",
            ["adapter"], registry=registry,
        )  # fmt: skip
        for name, classifier in {OWN_ADAPTER: model, **model["adapters"]}.items():
            self._referred.labels(name)
            for label in classifier["labels"]:
                self._predictions.labels(name, label)
        self._refusals = Counter(
            "clinora_refusals", "Requests and events refused", ["reason"], registry=registry
        )
        for reason in (*REFUSALS.values(), RATE_LIMIT):
            self._refusals.labels(reason)  # shown as 0 until it occurs
        self._connections = Counter(
            "clinora_connections_refused",
            "Connections closed before a whole request had arrived", ["status"], registry=registry,
        )  # fmt: skip
        for status in CONNECTION_STATUSES:
            self._connections.labels(status)
        self.batch_sizes = Histogram(
            "clinora_batch_notes", "Notes in a batch", buckets=BATCH_SIZES, registry=registry
        )
        info = {name: model[name] for name in ("run", "base", "version")}
        info["labels"] = str(len(model["labels"]))
        Info("clinora_model", "The model that is served", registry=registry).info(info)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a metric whose value is read at each scrape."""
        Gauge(name, description, registry=self._registry).set_function(value)

    def count(self, activity: Activity) -> None:
        """Count a request or an event that has ended."""
        if activity.event is None:
            route = activity.route or "none"
            self._requests.labels(route, activity.status).inc()
            self._request_seconds.labels(route).observe(activity.seconds)
        else:
            self._events.labels(activity.event, activity.status).inc()
            self._event_seconds.labels(activity.event).observe(activity.seconds)
        self._notes.inc(activity.notes)
        adapter = activity.adapter or OWN_ADAPTER
        for label, count in activity.classes.items():
            self._predictions.labels(adapter, label).inc(count)
        self._referred.labels(adapter).inc(activity.referred)
        reason = REFUSALS.get(activity.status)
        if activity.is_over_limit:
            reason = RATE_LIMIT
        if reason is not None:
            self._refusals.labels(reason).inc()

    def count_connection(self, status: int) -> None:
        """Count a connection that was closed before a whole request had arrived."""
        self._connections.labels(status).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
