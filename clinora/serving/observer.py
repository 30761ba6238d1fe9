"""Begins and ends the activity of each request: its id, its log line and its metrics."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinora.serving.activity import ACTIVITY, REQUEST_ID, Activity, begin_request
from clinora.serving.log import AccessLog
from clinora.serving.metrics import Metrics
from clinora.serving.rate_limit import RateLimit


class Observer:
    """Counts and logs activities.

    Args:
        metrics: Counts every activity.
        log: Gets a line for every activity; None: there is no log.
    """

    def __init__(self, metrics: Metrics, log: AccessLog | None) -> None:
        self._metrics = metrics
        self._log = log

    def end(self, activity: Activity) -> None:
        """End, count and log an activity."""
        activity.end()
        self._metrics.count(activity)
        if self._log is not None:
            self._log.add(activity.as_json())


class Observe:
    """ASGI middleware: the app finds the activity of a request in ``scope[ACTIVITY]``.

    Args:
        app: The app that receives the requests.
        observer: Gets the activities that have ended.
        rate_limit: Limits the notes of each user.
    """

    def __init__(self, app: ASGIApp, observer: Observer, rate_limit: RateLimit) -> None:
        self._app = app
        self._observer = observer
        self._rate_limit = rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        activity = begin_request(scope, self._rate_limit)
        scope[ACTIVITY] = activity

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                activity.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = activity.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._observer.end(activity)
