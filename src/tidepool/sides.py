"""Whose KV memory an engine uses: stock vLLM's, or one of tidepool's two partitions."""

from __future__ import annotations

from typing import Literal

Side = Literal["stock", "elastic", "fixed"]
SIDES: tuple[Side, ...] = ("stock", "elastic", "fixed")

TITLES: dict[Side, str] = {"stock": "stock vLLM", "fixed": "tidepool fixed", "elastic": "tidepool elastic"}
"""How sides are called in tables, in the order of their columns."""


def switch(side: str) -> dict[str, str]:
    """The environment variable that makes an engine of this side; it wins over a user's."""
    return {"TIDEPOOL": "off" if side == "stock" else side}
