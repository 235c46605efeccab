"""The arena's own account of its memory, block by block: what metrics are held against.

It shares nothing with the counts that metrics are made from: it looks at references and hashes alone.
"""

from __future__ import annotations

from typing import Any


def account(block_pool: Any) -> dict[tuple[str, str], int]:
    """Bytes of the device's memory by (group, use), as ``tidepool_memory_bytes`` has it."""
    arena = block_pool.arena
    found: dict[tuple[str, str], int] = {}
    lying = 0
    for group, pool in enumerate(arena.pools):
        size, stride = arena.block_bytes[group], arena.address(group, 1)
        in_use = cached = free = 0
        for extent in pool.extents.values():
            returned = set(extent.returned)
            for block in range(extent.first, extent.first + extent.blocks):
                if pool.refs[block]:
                    in_use += 1
                elif block in returned or block >= extent.first + extent.never_used:
                    free += 1
                    assert block_pool.pools[group].blocks[block].block_hash is None
                else:
                    cached += 1
                    assert block_pool.pools[group].blocks[block].block_hash is not None
        blocks = in_use + cached + free
        lying += blocks * stride
        for use, count in (("in_use", in_use), ("cached", cached), ("free", free)):
            found[str(group), use] = count * size
        found[str(group), "padding"] = blocks * (stride - size)
    found["", "null"] = arena.null_bytes
    found["", "unowned"] = arena.total_bytes - arena.null_bytes - lying
    return found
