"""The core and a slow account of the same memory go through the same random operations, and must agree on everything.

Blocks' contents are real here: each block that is handed out is filled with a token, in bytes at the address that the
core names, and must still hold it whenever somebody who may read it does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from math import lcm
from typing import ParamSpec, TypeVar

import pytest
from reference import Account, Block, CachedPrefix, Layout

from admission import admit
from tidepool.cache import (
    Arena,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    LeastRecentlyUsed,
    OutOfBlocksError,
    PrefixMatch,
    PriorityClass,
    ResumePoint,
    Retention,
    ReuseModel,
    Share,
    TurnClass,
)

P = ParamSpec("P")
T = TypeVar("T")

CALLS = 1000
"""Calls of the core in a run."""
SEEDS = range(15)
"""Runs of each partition with each policy: 60,000 calls in all."""


class Twins:
    """The core and the account, driven by one random number generator."""

    def __init__(self, partition: str, policy: str, seed: int) -> None:
        self.random = rng = random.Random(f"{partition} {policy} {seed}")
        self.roomy = seed % 4 == 3
        """Many small extents, and requests that hold more than a dozen of them, in place of few large ones."""
        self.many = seed % 5 == 4
        """Up to 30 groups."""
        groups = rng.randint(12, 30) if self.many else rng.randint(1, 5)
        per_extent = tuple(rng.randint(1, 4 if self.roomy else 12) for _ in range(groups))
        self.state_groups = frozenset(group for group in range(groups) if rng.random() < 0.4)
        self.returns = ReuseModel(rng.choice([1, 100, 10_000, 1_000_000]))
        self.policy_name = policy
        self.policy: LeastRecentlyUsed | ExpectedReturn = (
            LeastRecentlyUsed() if policy == "lru" else ExpectedReturn(self.returns)
        )
        if partition == "elastic":
            self.layout = self._build_elastic(per_extent)
        else:
            self.layout = self._build_fixed(per_extent)
        self.account = Account(self.layout)
        self.groups = self.account.groups
        self.memory = bytearray(self.layout.total_bytes)
        self.tokens: dict[Block, bytes] = {}
        self.holdings: dict[Hashable, list[list[int]]] = {}
        """Of each running request, the blocks that it holds of every group."""
        self.matches: dict[Hashable, PrefixMatch] = {}
        self.ended_later: list[list[list[int]]] = []
        """Blocks of requests that ended, to be released later."""
        self.calls = self.names = 0
        self.promised = False

    def _build_elastic(self, per_extent: tuple[int, ...]) -> Layout:
        rng = self.random
        extents = rng.randint(20, 40) if self.roomy else rng.randint(2, 12)
        extents += 2 * len(per_extent) if self.many else 0
        size = lcm(*per_extent) * rng.randint(1, 3)
        layouts = tuple(ExtentLayout(rng.randint(max(1, size // n // 2), size // n), size // n, n) for n in per_extent)
        self.arena = Arena.elastic(
            Geometry(size, layouts),
            extents,
            policy=self.policy,
            on_evict=self.on_evict,
            on_move=self.on_move,
            state_groups=self.state_groups,
        )
        sizes = tuple(layout.block_bytes for layout in layouts)
        strides = tuple(layout.stride for layout in layouts)
        first = (0,) * len(per_extent)
        return Layout(per_extent, strides, sizes, first, extents, extents * size, self.state_groups)

    def _build_fixed(self, per_extent: tuple[int, ...]) -> Layout:
        rng = self.random
        shares: list[Share] = []
        end = 30
        for n in per_extent:
            stride = rng.randint(1, 30)
            shares.append(Share(rng.randint(max(1, stride // 2), stride), stride, -(-end // stride), n * 3))
            end = (shares[-1].first + shares[-1].blocks) * stride
        self.arena = Arena.fixed(
            shares, end, policy=self.policy, on_evict=self.on_evict, state_groups=self.state_groups
        )
        return Layout(
            tuple(share.blocks for share in shares),
            tuple(share.stride for share in shares),
            tuple(share.block_bytes for share in shares),
            tuple(share.first for share in shares),
            None,
            end,
            self.state_groups,
        )

    # What the core calls.

    def on_evict(self, group: int, block: int) -> None:
        assert (group, block) in self.account.cached, "evicted a block that wasn't cached"
        self.read(group, block)
        assert self.promised or not self.arena.usage().unowned, "evicted while an extent was unowned"
        prefix = self.account.cached[group, block]
        assert prefix in self.account.may_go(self.policy_name, self.index_of), "another prefix was to go"
        prefix.broken = not prefix.low
        self.account.lost(group, block)

    def on_move(self, extent: int, old: int | None, new: int) -> None:
        self.account.moved(extent, old, new)

    def index_of(self, prefix: CachedPrefix) -> float:
        age = self.account.bytes_allocated - prefix.age_from
        return self.returns.reuse_index(age, TurnClass.NONE if prefix.shared else TurnClass(prefix.turn))

    # Contents.

    def span(self, group: int, block: int) -> slice:
        start = self.arena.address(group, block)
        return slice(start, start + self.layout.block_bytes[group])

    def write(self, group: int, block: int) -> None:
        token = bytes([self.random.randrange(1, 256)]) * self.layout.block_bytes[group]
        self.memory[self.span(group, block)] = self.tokens[group, block] = token

    def read(self, group: int, block: int) -> None:
        assert self.memory[self.span(group, block)] == self.tokens[group, block], "somebody wrote here"

    # Random operations.

    def some_request(self) -> Hashable | None:
        return self.random.choice(list(self.holdings)) if self.holdings else None

    def begin(self) -> None:
        """A request starts, with hits or without, and stays, or is refused and ends."""
        rng, name = self.random, f"r{self.names}"
        self.names += 1
        match = self.returns.began([rng.randrange(40) for _ in range(3)], self.arena.bytes_allocated)
        self.matches[name], turn = match, match.turn
        self.call(self.arena.start, name, turn)
        self.account.start(name, turn)
        self.holdings[name] = [[] for _ in self.groups]
        hits: list[list[int]] = []
        for group in self.groups:
            known = sorted(b for g, b in (*self.account.cached, *self.account.refs) if g == group)
            hits.append(rng.sample(known, rng.randint(0, min(len(known), 6))) if rng.random() < 0.6 else [])
        self.serve(name, hits, shared=turn == TurnClass.FIRST)
        if rng.random() < 0.3:
            self.end(name)

    def grow(self) -> None:
        """A running request needs more."""
        if (name := self.some_request()) is not None:
            self.serve(name, [[] for _ in self.groups], shared=False)

    def serve(self, name: Hashable, hits: list[list[int]], *, shared: bool) -> None:
        """Ask admission; if it says yes, everything asked for must be had."""
        rng, account = self.random, self.account
        # Between a block or two and more than there is.
        scale = rng.choice([0.3, 1, 1, 14 if self.roomy else 4])
        needs = [
            rng.randint(0, int(scale * self.layout.per_extent[g]) + 1) if rng.random() < 0.6 else 0 for g in self.groups
        ]
        idle = [[block for block in hits[g] if (g, block) in account.cached] for g in self.groups]
        more = [rng.randint(0, 3 * need) for need in needs]
        most = max(account.extents_needed(needs, idle), account.extents_needed(more, idle))
        assert self.call(self.arena.extents_needed_at_most, [needs, more], idle) == most
        admitted = self.call(admit, self.arena, needs, idle)
        assert admitted == (account.extents_needed(needs, idle) <= account.available())
        if not admitted:
            return
        self.promised = True
        for group in self.groups:
            if hits[group]:
                self.touch(name, group, hits[group], shared=shared)
        # A request may be gone before it has all that was reserved for it.
        for group in rng.sample(self.groups, len(self.groups) if rng.random() < 0.8 else 0):
            assert not needs[group] or self.allocate(name, group, needs[group]), "admitted, and refused"
            if rng.random() < 0.1:
                self.allocate(name, group, 1)  # Unasked for, and no reason for others to go without.
        self.call(self.arena.release_reservation)
        self.promised = False

    def allocate(self, name: Hashable | None, group: int, count: int) -> bool:
        """Returns whether they were had."""
        held = self.holdings[name][group] if name is not None else []
        last = held[-1] if held and self.random.random() < 0.9 else None
        most = self.account.most(group)
        self.account.bytes_allocated += count * self.layout.strides[group]
        try:
            blocks = self.call(self.arena.allocate, group, count, last=last, request=name)
        except OutOfBlocksError:
            assert self.promised or most < count, "refused what there was"
            self.account.released_count = self.arena.released  # Those that it had taken before it was refused.
            return False
        assert len(blocks) == len(set(blocks)) == count <= most
        self.account.allocated(group, blocks, name)
        for block in blocks:
            self.write(group, block)
        if name is not None:
            held += blocks
        else:
            self.ended_later.append([blocks if g == group else [] for g in self.groups])
        return True

    def allocate_unasked(self) -> None:
        """Without admission, with or without a name: what is there must be had."""
        group = self.random.choice(self.groups)
        name = self.some_request() if self.random.random() < 0.5 else None
        self.allocate(name, group, self.random.randint(1, 2 * self.layout.per_extent[group]))

    def touch(self, name: Hashable, group: int, blocks: Sequence[int], *, shared: bool) -> None:
        for block in blocks:
            self.read(group, block)
        told = name if self.random.random() < 0.7 else None
        self.call(self.arena.touch, group, blocks, request=told, **({"shared": True} if shared else {}))
        self.account.touched(group, blocks, told, shared=shared)
        self.holdings[name][group] += blocks

    def share(self) -> None:
        """A running request takes what another one has."""
        name, other = self.some_request(), self.some_request()
        if name is not None and other is not None:
            group = self.random.choice(self.groups)
            if theirs := [b for b in self.holdings[other][group] if b not in self.holdings[name][group]]:
                self.touch(name, group, self.random.sample(theirs, 1), shared=self.random.random() < 0.5)

    def release(self, name: Hashable | None, group: int, blocks: list[int]) -> None:
        rng = self.random
        keep = (
            [rng.choice([Retention.DROP, Retention.KEEP, Retention.KEEP, Retention.LOW]) for _ in blocks]
            if rng.random() < 0.9
            else []
        )
        if not blocks:
            return
        for block in blocks:
            self.read(group, block)
        self.call(self.arena.release, group, blocks, keep, request=name)
        self.account.released(group, blocks, keep, name)

    def leave_some(self) -> None:
        """A running request releases some of its blocks."""
        if (name := self.some_request()) is not None:
            group = self.random.choice(self.groups)
            held = self.holdings[name][group]
            some = self.random.sample(held, self.random.randint(0, min(len(held), 4)))
            self.holdings[name][group] = [block for block in held if block not in some]
            self.release(name if self.random.random() < 0.8 else None, group, some)

    def end(self, name: Hashable | None = None) -> None:
        """A request ends; its blocks are released now or later, or it is preempted and goes on."""
        name = self.some_request() if name is None else name
        if name is None:
            return
        rng, holdings = self.random, self.holdings.pop(name)
        later = rng.random() < 0.1
        if not later:
            for group in self.groups:
                self.release(name, group, holdings[group][::-1])
        if rng.random() < 0.1:
            self.holdings[name] = holdings if later else [[] for _ in self.groups]
            return
        if later:
            self.ended_later.append(holdings)
        self.call(self.arena.finish, name)
        self.account.finish(name)
        places = [ResumePoint(rng.randrange(40), distance, kept=rng.random() < 0.7) for distance in range(2)]
        self.returns.ended(places, self.arena.bytes_allocated, self.matches.pop(name))

    def release_late(self) -> None:
        if self.ended_later:
            holdings = self.ended_later.pop(self.random.randrange(len(self.ended_later)))
            for group in self.groups:
                self.release(None, group, holdings[group])

    def forget(self) -> None:
        """Some blocks' contents are dropped, among others that aren't cached."""
        rng, group = self.random, self.random.choice(self.groups)
        first, per_extent = self.layout.firsts[group], self.layout.per_extent[group]
        blocks = [first + rng.randrange(per_extent * (self.layout.extents or 1)) for _ in range(rng.randint(1, 4))]
        blocks += [b for g, b in sorted(self.account.cached) if g == group and rng.random() < 0.2]
        self.call(self.arena.forget, group, blocks)
        for block in blocks:
            if (group, block) in self.account.cached:
                self.account.lost(group, block)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.calls += 1
        return function(*args, **kwargs)

    # What must agree.

    def compare(self) -> None:
        arena, account = self.arena, self.account
        assert arena.available == account.available()
        assert arena.usage() == account.usage()
        assert arena.bytes_allocated == account.bytes_allocated
        assert arena.moves == account.moves
        assert arena.unowned == account.unowned()
        assert arena.released == account.released_count
        for group, pool in enumerate(arena.pools):
            live = {block: refs for (g, block), refs in account.refs.items() if g == group}
            cached = {block for g, block in account.cached if g == group}
            assert {block: refs for block, refs in enumerate(pool.refs) if refs} == live
            assert (pool.in_use, pool.cached) == (len(live), len(cached))
            assert set(pool.live()) == live.keys()
            assert set(pool.kept()) == cached
        self.compare_prefixes()

    def compare_prefixes(self) -> None:
        pools, account = self.arena.pools, self.account
        names = {(group, block): filed for group, block in account.cached if (filed := pools[group].prefixes[block])}
        assert names.keys() == account.cached.keys()
        counts = Counter(names.values())
        for filed, count in counts.items():
            assert filed.live == count
            entries = {self.arena._named(entry) for entry in filed.blocks}
            assert entries >= {name for name, of in names.items() if of is filed}
        assert sum(filed.live for filed in counts) == sum(pool.cached for pool in pools)
        assert len(counts) == len(set(account.cached.values())), "leaves were mixed up"
        assert len({(names[name], prefix) for name, prefix in account.cached.items()}) == len(counts)
        for name, prefix in account.cached.items():
            priority = names[name].priority
            assert (priority == PriorityClass.LOW, priority == PriorityClass.SHARED) == (prefix.low, prefix.shared)
            assert prefix.running or names[name].since == prefix.age_from
        assert Counter(self.queued()) == Counter(counts.keys()), "in a queue with nothing, or with something in none"
        assert self.arena._prefixes.keys() == self.holdings.keys(), "requests that have gone"
        for filed in (self.arena._low, *chain(*self.arena._prefixes.values())):
            assert filed.live or not filed.blocks, "entries pile up"

    def queued(self) -> list[object]:
        if isinstance(self.policy, LeastRecentlyUsed):
            return [*self.policy._queue]
        return [*self.policy._low, *self.policy._running, *chain(*self.policy._queues.values())]

    def run(self) -> None:
        operations = [self.begin, self.grow, self.allocate_unasked, self.share, self.leave_some, self.end]
        operations += [self.release_late, self.forget]
        weights = [8, 8, 3, 2, 6, 6, 2, 1]
        while self.calls < CALLS:
            (operation,) = self.random.choices(operations, weights)
            operation()
            self.compare()
        for name in list(self.holdings):
            while name in self.holdings:
                self.end(name)
        while self.ended_later:
            self.release_late()
        for group, block in self.account.cached:
            self.read(group, block)
        self.compare()
        assert self.arena.usage().in_use == 0


@pytest.mark.parametrize("policy", ["lru", "returns"])
@pytest.mark.parametrize("partition", ["elastic", "fixed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_agree(seed: int, partition: str, policy: str) -> None:
    Twins(partition, policy, seed).run()
