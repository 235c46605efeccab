"""Admission as the plugin has it: what a request takes is compared with what there is, and then reserved."""

from __future__ import annotations

from collections.abc import Sequence

from tidepool.cache import Arena


def admit(arena: Arena, needs: Sequence[int], touched: Sequence[Sequence[int]] | None = None) -> bool:
    """Whether ``needs[g]`` blocks of every group g can be had once some are touched, and if so reserve them."""
    charges, pinned = arena.extents_needed(needs, touched or [()] * len(arena.pools))
    if sum(charges) + pinned > arena.available:
        arena.release_reservation()
        return False
    arena.reserve(charges)
    return True
