"""tidepool: every KV cache group at its natural page size, in one elastic memory."""

__version__ = "0.1.0"
