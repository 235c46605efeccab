"""Host memory behind the device's: nothing is read or overwritten that a copy needs, in whatever order copies end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tidepool.cache import (
    Arena,
    Copy,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    HostTier,
    Left,
    OutOfBlocksError,
    Retention,
    ReuseModel,
    Speeds,
    TurnClass,
)

GROUPS = (1, 4)
"""Blocks in an extent: a group of states, and one of attention."""
SIZE = 48
GEOMETRY = Geometry(SIZE, tuple(ExtentLayout(SIZE // count, SIZE // count, count) for count in GROUPS))


def make_tier(extents: int) -> HostTier:
    tier = HostTier([SIZE // count for count in GROUPS])
    tier.arena = Arena.elastic(GEOMETRY, extents, policy=ExpectedReturn(ReuseModel(1)), on_evict=tier.evicted)
    return tier


class HostMachine(RuleBasedStateMachine):
    """A device whose blocks have contents, a host whose blocks have contents, and copies that end when they like.

    A copy reads its source as it begins and again as it ends; a block that changes in between was lost under it.
    """

    @initialize(device=st.integers(2, 6), host=st.integers(2, 6))
    def build(self, device: int, host: int) -> None:
        self.device = Arena.elastic(GEOMETRY, device, on_evict=self.lost_on_device)
        self.tier = make_tier(host)
        self.on_device: dict[tuple[int, int], str] = {}
        self.on_host: dict[tuple[int, int], str] = {}
        self.under_way: dict[int, tuple[Copy, list[str | None]]] = {}
        self.names = 0

    def lost_on_device(self, group: int, block: int) -> None:
        for copy, _ in self.under_way.values():
            assert (group, block) not in {(each.group, each.device) for each in copy.blocks}, "evicted under a copy"
        del self.on_device[group, block]

    def name(self) -> str:
        self.names += 1
        return f"r{self.names}"

    @rule(data=st.data(), states=st.integers(0, 1), attention=st.integers(0, 5), shared=st.booleans())
    def serve(self, data: st.DataObject, states: int, attention: int, shared: bool) -> None:
        """A request writes blocks, ends, and leaves them to both."""
        name = self.name()
        self.device.start(name, TurnClass.FIRST)
        got: list[tuple[int, int]] = []
        try:
            for group, count in enumerate((states, attention)):
                got += [(group, block) for block in self.device.allocate(group, count, request=name)]
        except OutOfBlocksError:
            got = []
        keys = st.integers(0, 30).map(str)
        for group, block in got:
            self.on_device[group, block] = data.draw(keys)
            self.device.release(group, [block], [Retention.KEEP], request=name)
        left = [
            Left(group, block, self.on_device[group, block], 16, shared) for group, block in self.device.left_by(name)
        ]
        self.begin(self.tier.store(name, TurnClass.FIRST, left))
        self.device.finish(name)

    def begin(self, copy: Copy | None) -> None:
        if copy is None:
            return
        for each in copy.blocks:
            for other, _ in self.under_way.values():
                assert (each.group, each.host) not in {(b.group, b.host) for b in other.blocks} or not (
                    copy.to_host or other.to_host
                ), "a block on the host is written while another copy uses it"
            self.device.touch(each.group, [each.device])
            if copy.to_host:
                self.on_host.pop((each.group, each.host), None)
        self.under_way[copy.number] = copy, self.sources(copy)

    def sources(self, copy: Copy) -> list[str | None]:
        if copy.to_host:
            return [self.on_device.get((each.group, each.device)) for each in copy.blocks]
        return [self.on_host.get((each.group, each.host)) for each in copy.blocks]

    @precondition(lambda self: len(self.tier) > 0)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """A request waits for some of what the host holds."""
        group = data.draw(st.sampled_from([g for g in range(len(GROUPS)) if any(self.held(g))]))
        key = data.draw(st.sampled_from(sorted(self.held(group))))
        try:
            (block,) = self.device.allocate(group, 1)
        except OutOfBlocksError:
            return
        self.on_device.pop((group, block), None)
        copy = self.tier.load([(group, key, block)])
        assert self.on_host[group, copy.blocks[0].host] == key
        self.begin(copy)
        self.device.release(group, [block], [Retention.DROP])

    def held(self, group: int) -> Iterator[str]:
        return (key for key in map(str, range(31)) if self.tier.find(group, key))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), failed=st.sampled_from([False, False, False, True]))
    def end(self, data: st.DataObject, failed: bool) -> None:
        """Copies end in any order."""
        copy, before = self.under_way.pop(data.draw(st.sampled_from(sorted(self.under_way))))
        assert self.sources(copy) == before, "a source changed under its copy"
        for each, contents in zip(copy.blocks, before, strict=True):
            assert contents is not None
            if copy.to_host:
                self.on_host[each.group, each.host] = contents
            elif not failed:
                self.on_device[each.group, each.device] = contents
        self.tier.ended(copy.number, failed=failed)
        for each in copy.blocks:
            kept = (each.group, each.device) in self.on_device
            self.device.release(each.group, [each.device], [Retention(kept)])

    @rule()
    def forget(self) -> None:
        self.tier.forget_all()
        assert len(self.tier) == 0

    @precondition(lambda self: len(self.tier) > 0)
    @rule(data=st.data())
    def lower(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([g for g in range(len(GROUPS)) if any(self.held(g))]))
        self.tier.lower(group, data.draw(st.sampled_from(sorted(self.held(group)))))

    @invariant()
    def what_is_found_is_there(self) -> None:
        for group in range(len(GROUPS)):
            for key in self.held(group):
                held = self.tier.find(group, key)
                assert held
                assert self.on_host[group, held.block] == key

    @invariant()
    def references_are_the_copies(self) -> None:
        blocks = [(each.group, each.host) for copy, _ in self.under_way.values() for each in copy.blocks]
        for group, block in blocks:
            assert self.tier.arena.pools[group].refs[block]
        if not self.under_way:
            assert self.tier.bytes_under_way == 0
            assert self.tier.arena.usage().in_use == 0, "host memory leaked"
            assert self.tier.arena.usage().cached == sum(
                SIZE // GROUPS[group] for group in range(len(GROUPS)) for _ in self.held(group)
            )

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            for number in list(self.under_way):
                del self.under_way[number]
                self.tier.ended(number)
            self.references_are_the_copies()


TestHost = HostMachine.TestCase
TestHost.settings = settings(max_examples=150, stateful_step_count=40)


def left(*keys: str, group: int = 1) -> list[Left]:
    return [Left(group, 1 + index, key, 16 * (index + 1)) for index, key in enumerate(keys)]


def test_found_once_its_copy_has_ended() -> None:
    tier = make_tier(4)
    copy = tier.store("a", TurnClass.FIRST, left("x", "y"))
    assert copy
    assert copy.to_host
    assert copy.bytes == 2 * SIZE // 4 == tier.bytes_under_way
    assert tier.find(1, "x") is None
    tier.ended(copy.number)
    held = tier.find(1, "y")
    assert held
    assert held.tokens == 32


def test_only_what_the_host_lacks_is_copied() -> None:
    tier = make_tier(4)
    first = tier.store("a", TurnClass.FIRST, left("x", "y"))
    second = tier.store("b", TurnClass.SECOND, left("x", "y", "z"))
    assert first
    assert second
    assert len(second.blocks) == 1, "what is on its way isn't copied again"
    tier.ended(second.number)
    tier.ended(first.number)
    assert tier.store("c", TurnClass.LATER, left("x", "y", "z")) is None


def test_what_was_left_anew_goes_last() -> None:
    tier = make_tier(3)
    for name, keys in ("a", ("p", "q", "r", "s")), ("b", ("t", "u", "v", "w")), ("c", ("p", "q", "r", "s")):
        if copy := tier.store(name, TurnClass.FIRST, left(*keys)):
            tier.ended(copy.number)
    copy = tier.store("d", TurnClass.FIRST, left("1", "2", "3", "4"))
    assert copy
    tier.ended(copy.number)
    assert all(tier.find(1, key) for key in "pqrs1234")
    assert not any(tier.find(1, key) for key in "tuvw")


def test_a_lowered_state_goes_first() -> None:
    tier = make_tier(4)
    for name, key in ("a", "x"), ("b", "y"), ("c", "z"):
        copy = tier.store(name, TurnClass.FIRST, left(key, group=0))
        assert copy
        tier.ended(copy.number)
    tier.lower(0, "z")
    copy = tier.store("d", TurnClass.FIRST, left("new", group=0))
    assert copy
    assert tier.find(0, "x")
    assert tier.find(0, "y")


def test_no_room_leaves_it_out() -> None:
    tier = make_tier(2)
    copy = tier.store("a", TurnClass.FIRST, left("p", "q", "r", "s"))
    assert copy
    assert tier.store("b", TurnClass.FIRST, left("t")) is None, "all of it is being copied"
    tier.ended(copy.number)
    assert tier.store("c", TurnClass.FIRST, left("t"))


@pytest.mark.parametrize("failed", [True, False])
def test_failed_and_forgotten_copies_leave_nothing(failed: bool) -> None:
    tier = make_tier(3)
    copy = tier.store("a", TurnClass.FIRST, left("x"))
    assert copy
    if not failed:
        tier.forget_all()
    tier.ended(copy.number, failed=failed)
    assert tier.find(1, "x") is None
    assert tier.arena.usage().cached == tier.arena.usage().in_use == 0


def test_what_is_left_anew_after_it_was_forgotten_is_copied_anew() -> None:
    """Whichever of the two copies ends first."""
    for first, second in (0, 1), (1, 0):
        tier = make_tier(4)
        copies = [tier.store("a", TurnClass.FIRST, left("x"))]
        tier.forget_all()
        copies.append(tier.store("b", TurnClass.FIRST, left("x")))
        before, anew = copies
        assert before
        assert anew, "it has other contents now"
        ends = (before, anew)
        tier.ended(ends[first].number)
        assert tier.store("c", TurnClass.FIRST, left("x")) is None, "it is on its way, or there"
        tier.ended(ends[second].number)
        held = tier.find(1, "x")
        assert held
        assert held.block == anew.blocks[0].host


def test_ages_by_the_clock_it_is_given() -> None:
    now = 5
    tier = HostTier([SIZE, SIZE])
    tier.arena = Arena.elastic(GEOMETRY, 3, on_evict=tier.evicted, clock=lambda: now)
    assert tier.arena.now == 5


def test_loads_what_takes_longer_to_read() -> None:
    speeds = Speeds()
    assert speeds.worth_loading(10_000, 100_000_000, 0), "a second of reading against ten milliseconds"
    for _ in range(40):
        speeds.loaded(10_000_000, 1.0)
    assert not speeds.worth_loading(10_000, 100_000_000, 0), "the link has turned out slow"
    for _ in range(40):
        speeds.read(100, 1.0)
    assert speeds.worth_loading(10_000, 100_000_000, 0), "reading has turned out slower"
    assert not speeds.worth_loading(10_000, 100_000_000, 10**10), "others are before it"
