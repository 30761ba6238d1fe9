"""The page and the API: a FastAPI app with Gradio behind it, for the person at this machine.

No note's text may reach a log, so errors are logged by ``report_error``: a message may quote what
came in, a type and a place cannot.
"""

import logging
import secrets
import traceback
from pathlib import Path

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
