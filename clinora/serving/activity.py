"""What is recorded of a request or an event of the page: counts and names, never a text.

Whatever a client can choose freely is left out: of the path only the pattern of its route, of the
method only a known one, of the user only a name whose password was right.
"""

import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from clinora.classifier import Prediction
from clinora.serving.proxy import network_of
from clinora.serving.rate_limit import RateLimit, RateLimitError

ACTIVITY = "clinora.activity"  # key of a request's activity in its ASGI scope
REQUEST_ID = "X-Request-ID"
REQUEST_ID_PATTERN = re.compile("[A-Za-z0-9-]{1,64}")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_CLOSED = 499  # the client has left without an answer; nginx logs the same number


@dataclass(eq=False, kw_only=True, slots=True)
class Activity:
    """One HTTP request, or one event of the page.

    Attributes:
        id: Of the request. An event has the id of the request that triggered it.
        scope: ASGI scope of the request.
        rate_limit: Limits how many notes its user may send.
        route: Pattern of the request's route; None if there is no such route.
        event: Name of the event; None for a request.
        status: Of the response. An event has the status that a response would have.
        adapter: Name of the adapter that the request has chosen; None for the run's own.
        notes: Number of notes received for classification or comparison.
        classes: How many notes have each predicted class.
        referred: How many notes were referred to a person.
        is_over_limit: Whether it was refused because of the rate limit.
        seconds: Time from the request to the end.
    """

    id: str
    scope: Scope
    rate_limit: RateLimit
    route: str | None
    event: str | None = None
    status: int = CLIENT_CLOSED
    adapter: str | None = None
    notes: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    referred: int = 0
    is_over_limit: bool = False
    seconds: float = 0.0
    _time: datetime = field(default_factory=lambda: datetime.now(UTC))
    _began: float = field(default_factory=time.perf_counter)

    @property
    def user(self) -> str | None:
        """The user who is logged in; None without passwords or with a wrong one."""
        return self.scope.get("user")

    def admit(self, notes: int) -> None:
        """Record how many notes were received, before they are classified.

        The client's network counts as the user if nobody is logged in.

        Raises:
            RateLimitError: The user has sent too many notes.
        """
        self.notes = notes
        try:
            self.rate_limit.take(self.user or network_of(self.scope["client"]), notes)
        except RateLimitError:
            self.is_over_limit = True
            raise

    def add(self, prediction: Prediction) -> None:
        """Count the prediction of one note."""
        self.classes[prediction.label] += 1
        if prediction.refer:
            self.referred += 1

    def begin_event(self, event: str) -> "Activity":
        """Return the activity of an event that this request has triggered."""
        return Activity(
            id=self.id,
            scope=self.scope,
            rate_limit=self.rate_limit,
            route=self.route,
            event=event,
            _time=self._time,
            _began=self._began,
        )

    def end(self) -> None:
        """Record the time until now."""
        self.seconds = time.perf_counter() - self._began

    def as_json(self) -> dict:
        """Return the line of the access log."""
        method = self.scope["method"]
        return {
            "time": self._time.isoformat(timespec="milliseconds"),
            "id": self.id,
            "user": self.user,
            "route": self.route,
            "event": self.event,
            "method": method if method in METHODS else None,
            "adapter": self.adapter,
            "notes": self.notes,
            "classes": dict(self.classes),
            "referred": self.referred,
            "status": self.status,
            "ms": round(1000 * self.seconds, 1),
        }


def begin_request(scope: Scope, rate_limit: RateLimit) -> Activity:
    """Return the activity of an HTTP request, with the id that the client sent if it is valid."""
    request_id = Headers(scope=scope).get(REQUEST_ID, "")
    if not REQUEST_ID_PATTERN.fullmatch(request_id):
        request_id = str(uuid.uuid4())
    return Activity(id=request_id, scope=scope, rate_limit=rate_limit, route=_route_of(scope))


def _route_of(scope: Scope) -> str | None:
    """Return the pattern of a request's route, even if the route has other methods."""
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match is not Match.NONE:
            return route.path
    return None
