"""Files of recorded requests, one module for each format; `read_trace` finds out which one a file has."""

from tidepool.replay.formats.reading import Trace, read_trace

__all__ = ["Trace", "read_trace"]
