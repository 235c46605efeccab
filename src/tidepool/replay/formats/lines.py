"""The lines of a file, packed or not, and what is wrong with one."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tidepool.replay.trace import TraceError

Line = tuple[int, str]
"""Its number, from 1, and its text."""
_GZIP = b"\x1f\x8b"
"""What a gzip'd file begins with."""


class LineError(ValueError):
    """A line that is no request; the message says why, without a full stop."""


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[Line]]:
    """Lines that aren't blank, of a text file in UTF-8, with or without a byte order mark, gzip'd or not.

    Raises:
        TraceError: the file can't be read, also where that shows only at a later line.
    """
    try:
        if not path.is_file():
            path.stat()
            raise TraceError(f"{path} isn't a regular file.")
        with _open(path) as file:
            yield ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} isn't UTF-8 text.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "its gzip data is broken"
        raise TraceError(f"Can't read {path}: {reason}.") from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig")
