"""Assembles the app that serves the page and the API from the modules of this package."""

import asyncio
import ipaddress
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import gradio
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clinora.classifier import Classifier
from clinora.serving import report_error
from clinora.serving.api import add_routes, describe_model
from clinora.serving.api_page import add_description
from clinora.serving.batcher import Batcher
from clinora.serving.events import observe_events
from clinora.serving.flags import Flags
from clinora.serving.gate import add_page
from clinora.serving.guard import BodyLimit, Guard
from clinora.serving.lesson_process import Lessons
from clinora.serving.log import AccessLog
from clinora.serving.metrics import Metrics
from clinora.serving.observer import Observe, Observer
from clinora.serving.openapi import build_document
from clinora.serving.page import STYLES, THEME, build_page, page_head
from clinora.serving.passwords import BasicAuth
from clinora.serving.proxy import Proxies
from clinora.serving.rate_limit import RateLimit
from clinora.serving.server import serve
from clinora.serving.storage import KEPT_SECONDS, Storage
from clinora.serving.words import words_about

__all__ = ["create_app", "serve"]

MOST_SESSIONS_WITH_STATE = 1_000  # sessions of which Gradio keeps the last notes
AT_ONCE = 32  # handlers of the page that run at once; the batcher limits the load on the model
MOST_QUEUED_EVENTS = 64  # events of the page that wait for a handler
# Any other host name may be another site's that its owner points at this machine (DNS rebinding).
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]
# The page's address or path behind a proxy: https://notes.example/clinora or /clinora.
ROOT_PATTERN = re.compile(r"(https?://[A-Za-z0-9.:-]+)?(/[A-Za-z0-9._~%-]+)*/?")


def create_app(
    classifier: Classifier,
    flags_folder: str | Path,
    *,
    adapters: Mapping[str, Classifier] | None = None,
    hosts: Sequence[str] = (),
    users: dict[str, tuple[bytes, bytes]] | None = None,
    card: str = "",
    examples: Sequence[str] = (),
    url: str = "http://127.0.0.1:7860",
    trusted_proxies: Sequence[str] = (),
    run: str = "unnamed",
    log: AccessLog | None = None,
    rate_limit: RateLimit | None = None,
    live_lesson: bool = False,
) -> FastAPI:
    """Create the app. The page at ``/`` and the API share one batcher.

    If a proxy serves the page below a sub-path, Gradio's variable ``GRADIO_ROOT_PATH`` has to give
    the page's address, such as ``https://notes.example/clinora``, or the sub-path alone.

    Args:
        classifier: A trained run.
        flags_folder: Folder for flagged predictions. It is created with the first flag.
        adapters: Other runs of the same base, by the name with which a request chooses one.
        hosts: Host names that the app accepts in addition to those of the loopback address.
        users: Salt and password hash of each user. With None, no password is required.
        card: The model card, in Markdown.
        examples: The run's own examples, instead of the published ones.
        url: The app's address, for the examples on the page. An address in ``GRADIO_ROOT_PATH``
            takes precedence.
        trusted_proxies: Addresses or networks, such as ``10.0.0.0/28``, of the proxies whose
            X-Forwarded-For and X-Forwarded-Proto headers are trusted.
        run: Name of the run, for ``/v1/model`` and the metrics.
        log: The access log; None: there is none. The caller closes it after the service has ended.
        rate_limit: How many notes a minute each user may send, or each network of clients without
            users; None: the default limit.
        live_lesson: Whether to offer the live lesson, which trains on the server, although
            passwords are required. Without passwords it is always offered.

    Raises:
        ValueError: A trusted proxy is not an IP address or a network, or ``GRADIO_ROOT_PATH`` is
            neither an address nor a path.
    """
    proxies = [ipaddress.ip_network(address) for address in trusted_proxies]
    root = _read_root()
    if root.startswith("http"):
        url = root
    _keep_libraries_quiet()
    storage = Storage()
    # Gradio reads these variables when the page is built.
    os.environ["GRADIO_TEMP_DIR"] = str(storage.folder)  # where it keeps the handlers' files
    # Otherwise Gradio summarises its events with pandas after each of them.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "50"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000"
    if rate_limit is None:
        rate_limit = RateLimit()
    if adapters is None:
        adapters = {}
    model = describe_model(classifier, run, adapters, rate_limit.notes_per_minute)
    metrics = Metrics(model)
    batcher = Batcher(classifier, metrics.batch_sizes.observe)
    metrics.watch("clinora_waiting", "Notes and jobs that wait for the model", batcher.waiting)
    if log is not None:
        metrics.watch("clinora_lost_log_lines", "Lines that the log lacks", lambda: log.lost_lines)
    observer = Observer(metrics, log)
    words = words_about(classifier, examples)
    lessons = Lessons() if users is None or live_lesson else None
    page = build_page(batcher, Flags(flags_folder), storage, words, lessons, card, url)
    observe_events(page, observer)
    page.state_session_capacity = MOST_SESSIONS_WITH_STATE
    # Gradio's own threads; in a shared pool, waiting handlers would block all other routes.
    page.max_threads = AT_ONCE
    page.has_launched = True  # otherwise Gradio does not check file paths
    page.queue(api_open=False, max_size=MOST_QUEUED_EVENTS, default_concurrency_limit=AT_ONCE)
    gradio_app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        root_path=root,
        app_kwargs={"openapi_url": None},
        footer_links=[],
        show_error=False,
        blocked_paths=[str(Path(flags_folder).resolve())],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=THEME,
        css_paths=STYLES,
        head=page_head(),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        cleanup = asyncio.create_task(_remove_old_files(storage))
        async with gradio_app.router.lifespan_context(gradio_app):
            yield
        cleanup.cancel()
        await run_in_threadpool(batcher.close)
        storage.close()

    app = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    # The middleware added last runs first, so a body is read only after the password check.
    app.add_middleware(BodyLimit)
    if users is not None:
        app.add_middleware(BasicAuth, users=users)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *hosts])
    app.add_middleware(Guard)
    app.add_middleware(Observe, observer=observer, rate_limit=rate_limit)
    app.add_middleware(Proxies, trusted=proxies)
    add_routes(app, batcher, adapters, metrics, model)
    add_description(app, build_document(model, root, needs_password=users is not None))
    add_page(app, page, gradio_app, storage)
    app.state.gradio = gradio_app.routes[-1].app  # mount_gradio_app added this route last
    app.state.batcher = batcher
    app.state.metrics = metrics
    app.state.lessons = lessons
    app.state.trusted_proxies = proxies
    return app


def _read_root() -> str:
    """Read the address or the path that the page has behind a proxy; "" without a sub-path.

    Raises:
        ValueError: ``GRADIO_ROOT_PATH`` is neither an address nor a path.
    """
    root = os.environ.get("GRADIO_ROOT_PATH", "")
    if not ROOT_PATTERN.fullmatch(root):
        raise ValueError(
            f"GRADIO_ROOT_PATH={root}: expected the address of the page behind the proxy, such as "
            "https://notes.example/clinora, or its path, such as /clinora"
        )
    return root.rstrip("/")


def _keep_libraries_quiet() -> None:
    """Stop Gradio from printing its inputs, and malformed forms from filling the log."""
    # Errors that occur before a handler runs quote its inputs.
    quiet = SimpleNamespace(print_exc=lambda: report_error(sys.exception()))
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = quiet
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


async def _remove_old_files(storage: Storage) -> None:
    while True:
        await asyncio.sleep(KEPT_SECONDS / 6)
        await run_in_threadpool(storage.remove_old)
