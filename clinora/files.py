"""Recognise what a file is by its first bytes, whatever its name.

No error quotes a file's content, because that may be a note.
"""

import re
from collections.abc import Sequence

START_BYTES = 512  # enough to recognise a file

# What may stand in the place of any file: a pattern of its beginning, what it is, what to do.
KINDS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "is a Git LFS pointer, not the file itself: run git lfs pull, or download the file",
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html)",
        "is a web page, not the file itself: download the file",
    ),
    # gzip, bzip2, xz and zstd. A safetensors file may have gzip's first bytes but not its ninth.
    (
        rb"(?s)\x1f\x8b\x08.{5}[\0\2\4]|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd",
        "is compressed: unpack it first",
    ),
)


def recognise(start: bytes, kinds: Sequence[tuple[bytes, str]] = KINDS) -> str | None:
    """Say what a file is and what to do with it, such as "is compressed: unpack it first".

    Args:
        start: The first ``START_BYTES`` of the file, or more.
        kinds: The kinds that would be wrong; a file of none of them gives None.
    """
    for pattern, kind in kinds:
        if re.match(pattern, start):
            return kind
    return None
