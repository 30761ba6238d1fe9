"""The app that serves the page and the API: assembled from the modules of this package."""

import asyncio
import ipaddress
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import gradio
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clinora.classifier import Classifier
from clinora.serving import report_error
from clinora.serving.api import add_routes
from clinora.serving.batcher import Batcher
from clinora.serving.flags import Flags
from clinora.serving.gate import add_page
from clinora.serving.guard import BodyLimit, Guard
from clinora.serving.page import CSS, THEME, build_page
from clinora.serving.passwords import Door
from clinora.serving.proxy import Proxies
from clinora.serving.server import serve
from clinora.serving.storage import KEPT_SECONDS, Storage

__all__ = ["create_app", "serve"]

MOST_SESSIONS = 1_000  # whose last prediction is remembered, for a flag
AT_ONCE = 32  # handlers of the page that run; the batcher bounds what reaches the model
MOST_EVENTS = 64  # of the page that wait for a handler
# Another name would be another site's, whose owner has it point here (DNS rebinding).
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]


def create_app(
    classifier: Classifier,
    flags_folder: str | Path,
    *,
    hosts: Sequence[str] = (),
    users: dict[str, tuple[bytes, bytes]] | None = None,
    card: str = "",
    url: str = "http://127.0.0.1:7860",
    trusted_proxies: Sequence[str] = (),
) -> FastAPI:
    """Make the app: the page at ``/``, the API beside it, one batcher for both.

    Args:
        classifier: A trained run.
        flags_folder: Where flagged predictions go; made at the first one.
        hosts: Names that the app answers to beside those of the loopback address.
        users: Salt and password hash of each user; None: no password is asked for.
        card: What the model card says of the run, in Markdown.
        url: Where the app is, for the snippets that the page shows.
        trusted_proxies: Addresses or networks, as ``10.0.0.0/28``, of the proxies whose
            X-Forwarded-For and X-Forwarded-Proto are believed.

    Raises:
        ValueError: A trusted proxy is neither an address nor a network.
    """
    proxies = [ipaddress.ip_network(address) for address in trusted_proxies]
    _keep_libraries_quiet()
    storage = Storage()
    # Gradio keeps what a handler gives it here, and reads these when the page is built.
    os.environ |= {
        "GRADIO_TEMP_DIR": str(storage.folder),
        # Gradio summarises its events with pandas at every event, or so rarely.
        "GRADIO_ANALYTICS_MAX_EVENTS": "50",
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000",
    }
    batcher = Batcher(classifier)
    page = build_page(batcher, Flags(flags_folder), storage, card, url)
    page.state_session_capacity = MOST_SESSIONS
    page.max_threads = AT_ONCE  # of its own, or waiting handlers would hold up all other routes
    page.has_launched = True  # or Gradio does not check the paths of files
    page.queue(api_open=False, max_size=MOST_EVENTS, default_concurrency_limit=AT_ONCE)
    gradio_app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        show_error=False,
        blocked_paths=[str(Path(flags_folder).resolve())],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        removing = asyncio.create_task(_remove_old_files(storage))
        async with gradio_app.router.lifespan_context(gradio_app):
            yield
        removing.cancel()
        await run_in_threadpool(batcher.close)
        storage.close()

    app = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    # The last added is the first that a request meets: a stranger's body is not read.
    app.add_middleware(BodyLimit)
    if users is not None:
        app.add_middleware(Door, users=users)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *hosts])
    app.add_middleware(Guard)
    app.add_middleware(Proxies, trusted=proxies)
    add_routes(app, batcher)
    add_page(app, page, gradio_app, storage)
    app.state.gradio = gradio_app.routes[-1].app
    app.state.batcher = batcher
    app.state.trusted_proxies = proxies
    return app


def _keep_libraries_quiet() -> None:
    """Keep Gradio from printing what came in, and the log from filling with malformed forms."""
    quiet = SimpleNamespace(print_exc=lambda: report_error(sys.exception()))
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = quiet  # errors before a handler runs quote its inputs
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


async def _remove_old_files(storage: Storage) -> None:
    while True:
        await asyncio.sleep(KEPT_SECONDS / 6)
        await run_in_threadpool(storage.remove_old)
