"""The page: a FastAPI app with Gradio mounted, for the person at this machine.

Gradio reads its settings from the environment when it is imported. They are set here, which runs
before any module of this folder; ``import clinora`` alone does not come here.

No note's text may reach a log, so errors are logged by ``report_error``: a message may quote what
came in, a type and a place cannot.
"""

import atexit
import logging
import os
import secrets
import shutil
import tempfile
import traceback
from pathlib import Path

# mkdtemp's folder is 0700; Gradio's own default is one folder that all users share.
_temporary = tempfile.mkdtemp(prefix="clinora-page-")
atexit.register(shutil.rmtree, _temporary, ignore_errors=True)

os.environ |= {
    "GRADIO_TEMP_DIR": _temporary,
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Gradio summarises its events with pandas at every event, or so rarely.
    "GRADIO_ANALYTICS_MAX_EVENTS": "50",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000",
}

_log = logging.getLogger(__name__)


def report_error(error: BaseException) -> str:
    """Log an error's type and place, without its message, and give a reference to it."""
    reference = secrets.token_hex(4)
    frames = list(traceback.walk_tb(error.__traceback__))
    place = "an unknown place"
    if frames:
        frame, line = frames[-1]
        file = Path(frame.f_code.co_filename)
        place = f"{file.parent.name}/{file.name}:{line}"
    _log.error("reference %s: %s at %s", reference, type(error).__name__, place)
    return reference
