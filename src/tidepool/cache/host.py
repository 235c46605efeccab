"""Host memory behind the device's: what it holds, and the copies under way between the two.

The host's memory is an arena of the same kind as the device's: natural blocks, states and attention over the same
extents. What a request leaves in the device's cache is copied there; what a later prompt finds there is copied back. A
block of a group is one contiguous piece of memory in both.

Contents are named by keys, as a hash of the text up to them does. A key is found here from the moment on at which its
copy has ended, until its block is evicted.

A copy takes time, and copies end in any order. Invariant: as long as a copy is under way, its blocks on the host are
referenced, so that nothing evicts them; the caller keeps a reference to its blocks on the device likewise.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from tidepool.cache.arena import Arena, Retention
from tidepool.cache.reuse import TurnClass


class Left(NamedTuple):
    """A cached block on the device that may be copied to the host."""

    group: int
    block: int
    key: Hashable
    tokens: int
    """Up to where its contents go."""
    shared: bool = False
    """Whether several prompts begin with it."""


class Held(NamedTuple):
    """What the host holds of a key."""

    block: int
    tokens: int
    """Up to where its contents go."""


class BlockCopy(NamedTuple):
    """One block's part of a copy."""

    group: int
    device: int
    host: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy under way."""

    number: int
    to_host: bool
    blocks: tuple[BlockCopy, ...]
    bytes: int


class _Store(NamedTuple):
    """What is to be done once a copy to the host has ended."""

    name: Hashable
    left: tuple[Left, ...]
    """What is copied, in the order of the copy's blocks."""
    filed: tuple[tuple[int, int], ...]
    """(group, block on the host) of all that the request left, in the order in which it goes."""


class HostTier:
    """What is in host memory.

    Args:
        arena: the host's memory; its callback for evictions is to be this object's `evicted`.
        block_bytes: bytes of one block of each group.
    """

    def __init__(self, block_bytes: Sequence[int]) -> None:
        self.arena: Arena
        """The host's memory, set by the caller: its callback for evictions is `evicted`."""
        self._block_bytes = tuple(block_bytes)
        self._held: list[dict[Hashable, Held]] = [{} for _ in block_bytes]
        self._keys: list[dict[int, Hashable]] = [{} for _ in block_bytes]
        """By group and block on the host, the key of its contents."""
        self._coming: set[tuple[int, Hashable]] = set()
        """Keys whose copy to the host is under way."""
        self._copies: dict[int, tuple[Copy, _Store | None]] = {}
        self._numbers = 0
        self._forgotten: set[int] = set()
        """Copies to the host whose contents nobody may find once they have ended."""
        self.bytes_under_way = 0

    # What is held.

    def find(self, group: int, key: Hashable) -> Held | None:
        """What the host holds of a key; None if nothing."""
        return self._held[group].get(key)

    def __len__(self) -> int:
        """Blocks that can be found."""
        return sum(map(len, self._held))

    @property
    def copies(self) -> int:
        """Copies under way."""
        return len(self._copies)

    def evicted(self, group: int, block: int) -> None:
        """The host's arena takes a cached block away."""
        key = self._keys[group].pop(block)
        del self._held[group][key]

    def lower(self, group: int, key: Hashable) -> None:
        """Keep a state at low priority from now on: another one serves in its place."""
        held = self._held[group].get(key)
        if held is not None and not self.arena.pools[group].refs[held.block]:
            self.arena.touch(group, [held.block])
            self.arena.release(group, [held.block], [Retention.LOW])

    def forget_all(self) -> list[tuple[int, int]]:
        """Forget all contents; copies under way end as they would, and leave nothing.

        Returns:
            (group, block on the host) of contents that nobody copies.
        """
        self._forgotten.update(number for number, (_, store) in self._copies.items() if store)
        # What is left anew has other contents.
        self._coming.clear()
        gone: list[tuple[int, int]] = []
        for group, held in enumerate(self._held):
            cached = [each.block for each in held.values()]
            held.clear()
            self._keys[group].clear()
            gone += [(group, block) for block in cached if not self.arena.pools[group].refs[block]]
            self.arena.forget(group, cached)
        return gone

    # Copies.

    def store(self, name: Hashable, turn: TurnClass, left: Iterable[Left]) -> Copy | None:
        """Take over what a request leaves in the device's cache.

        What the host holds already counts as used anew. What it lacks is to be copied; if there is no room for it
        because everything is being copied, it is left out.

        Args:
            name: a name that no store before had.
            turn: of the request, by which the host's policy judges it.
            left: what it leaves, the first to be evicted first.

        Returns:
            The copy to make, and to end by `ended`; None if the host has everything.
        """
        arena = self.arena
        # Two blocks on the device may have the same contents.
        left = list({(each.group, each.key): each for each in left}.values())
        held = [self._held[each.group].get(each.key) for each in left]
        for each, known in zip(left, held, strict=True):
            if known:
                arena.touch(each.group, [known.block], shared=each.shared)
        missing = [each for each, known in zip(left, held, strict=True) if not known]
        missing = [each for each in missing if (each.group, each.key) not in self._coming]
        new = self._take(name, turn, missing)
        targets = {(each.group, each.key): block for each, block in zip(missing, new, strict=False)}
        filed: list[tuple[int, int]] = []
        for each, known in zip(left, held, strict=True):
            block = known.block if known else targets.get((each.group, each.key))
            if block is not None:
                filed.append((each.group, block))
        store = _Store(name, tuple(missing[: len(new)]), tuple(filed))
        if not new:
            self._file(store)
            return None
        self._coming.update(targets)
        blocks = tuple(BlockCopy(each.group, each.block, block) for each, block in zip(missing, new, strict=True))
        return self._begin(blocks, store)

    def _take(self, name: Hashable, turn: TurnClass, missing: Sequence[Left]) -> list[int]:
        """Host blocks for all that is missing, each with a reference, or none."""
        arena = self.arena
        arena.start(name, turn)
        groups = range(len(arena.pools))
        needs = [0] * len(arena.pools)
        for each in missing:
            needs[each.group] += 1
        charges, _ = arena.extents_needed(needs, [()] * len(needs))
        if sum(charges) > arena.available:
            return []
        arena.reserve(charges)
        taken = [iter(arena.allocate(group, needs[group], request=name)) for group in groups]
        arena.release_reservation()
        blocks = [next(taken[each.group]) for each in missing]
        for each, block in zip(missing, blocks, strict=True):
            arena.pools[each.group].shared[block] = each.shared
        return blocks

    def load(self, wanted: Sequence[tuple[int, Hashable, int]]) -> Copy:
        """Copy what the host holds to the device.

        Args:
            wanted: (group, key, block on the device), of keys that are held.
        """
        blocks = tuple(BlockCopy(group, block, self._held[group][key].block) for group, key, block in wanted)
        for each in blocks:
            self.arena.touch(each.group, [each.host])
        return self._begin(blocks, None)

    def _begin(self, blocks: tuple[BlockCopy, ...], store: _Store | None) -> Copy:
        self._numbers += 1
        size = sum(self._block_bytes[each.group] for each in blocks)
        copy = Copy(self._numbers, store is not None, blocks, size)
        self._copies[copy.number] = copy, store
        self.bytes_under_way += size
        return copy

    def ended(self, number: int, *, failed: bool = False) -> Copy:
        """A copy has ended on all ranks; the caller's references to its blocks on the device may go.

        Args:
            number: the copy's.
            failed: whether it failed on any rank: nobody finds its contents.

        Raises:
            KeyError: no such copy is under way.
        """
        copy, store = self._copies.pop(number)
        self.bytes_under_way -= copy.bytes
        if store is None:
            for each in copy.blocks:
                kept = Retention.KEEP if each.host in self._keys[each.group] else Retention.DROP
                self.arena.release(each.group, [each.host], [kept])
            return copy
        forgotten = number in self._forgotten
        self._forgotten.discard(number)
        for left, block in zip(store.left, copy.blocks, strict=True):
            if forgotten:
                continue
            self._coming.discard((left.group, left.key))
            if not failed:
                self._held[left.group][left.key] = Held(block.host, left.tokens)
                self._keys[left.group][block.host] = left.key
        self._file(store)
        return copy

    def _file(self, store: _Store) -> None:
        """Release what a request has left, now cached here as one prefix."""
        for group, same in groupby(store.filed, lambda each: each[0]):
            keys = self._keys[group]
            blocks = [block for _, block in same]
            kept = [Retention.KEEP if block in keys else Retention.DROP for block in blocks]
            self.arena.release(group, blocks, kept, request=store.name)
        self.arena.finish(store.name)
