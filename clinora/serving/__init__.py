"""The page and the API: a FastAPI app in front of Gradio, for the user of this machine.

The text of a note must not reach a log. An error's message may quote its input, so ``report_error``
logs only the error's type and place.
"""

import logging
import secrets
import traceback
from pathlib import Path

_log = logging.getLogger(__name__)


def report_error(error: BaseException) -> str:
    """Log an error's type and place without its message, and return a reference to the log line."""
    reference = secrets.token_hex(4)
    _log.error("reference %s: %s", reference, type_and_place(error))
    return reference


def type_and_place(error: BaseException) -> str:
    """Say what kind of error it is and where it was raised, without its message."""
    frames = list(traceback.walk_tb(error.__traceback__))
    place = "an unknown place"
    if frames:
        frame, line = frames[-1]
        file = Path(frame.f_code.co_filename)
        place = f"{file.parent.name}/{file.name}:{line}"
    return f"{type(error).__name__} at {place}"
