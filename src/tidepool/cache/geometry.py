"""How the arena is cut: one extent size that every group's blocks tile.

All extents are E bytes. Group g cuts an extent into ``slots`` blocks that lie ``stride`` bytes apart, with

    E = slots_g x stride_g        for every group g                                    (1)
    stride_g >= block_bytes_g     and a multiple of the group's alignment              (2)

By (1) block ``extent x slots + slot`` starts at byte ``block x stride`` of the arena, so a group's blocks are one
strided view of the whole arena: kernels see an ordinary paged cache, whoever owns which extent.

The waste is the padding, ``1 - block_bytes / stride``. The choice of E trades it against coarseness: memory moves
between groups an extent at a time, so the smallest E that pads little enough is best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import islice
from math import lcm

from tidepool.cache.spec import CacheConfigError, Group

MAX_PADDING_TWO = 0.01
"""Padding that every group stays under where there are at most two."""
MAX_PADDING_MANY = 0.02
"""Padding that every group stays under where there are more."""
MAX_BLOCKS_OF_LARGEST = 128
"""An extent holds at most so many blocks of the group with the largest ones."""
_EXACT_CANDIDATES = 4096
_SMOOTH_CANDIDATES = 200_000
_SMALL_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Cut:
    """How one group cuts an extent."""

    block_bytes: int
    stride: int
    """Bytes from one block to the next."""
    slots: int
    """Blocks in an extent."""

    @property
    def padding(self) -> float:
        """Share of the stride that holds nothing, 0 to 1."""
        return 1 - self.block_bytes / self.stride


@dataclass(frozen=True)
class Geometry:
    """An extent size and, for each group in order, its cut."""

    extent_bytes: int
    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        for cut in self.cuts:
            if cut.slots * cut.stride != self.extent_bytes or cut.stride < cut.block_bytes:
                raise CacheConfigError(f"{cut} doesn't tile an extent of {self.extent_bytes:,} bytes.")

    @property
    def padding(self) -> float:
        """The worst group's padding, 0 to 1."""
        return max(cut.padding for cut in self.cuts)

    def extents_for(self, blocks: Sequence[int]) -> int:
        """Extents that hold ``blocks[g]`` blocks of each group g, no extent shared."""
        return sum(-(-need // cut.slots) for need, cut in zip(blocks, self.cuts, strict=True))


def choose_geometry(groups: Sequence[Group], *, max_padding: float | None = None) -> Geometry:
    """Choose the smallest extent that pads every group by less than ``max_padding``.

    Extents that the smallest blocks fill without padding are tried first: that group has the most blocks, so
    padding costs the most there. Then come sizes with many divisors, which many groups can share.

    Args:
        groups: the groups, of any block sizes.
        max_padding: 0 to 1; by default 1% for one or two groups and 2% for more.

    Raises:
        CacheConfigError: no extent size up to 128 blocks of the largest group pads so little.
    """
    if not groups:
        raise CacheConfigError("A geometry needs at least one group.")
    if max_padding is None:
        max_padding = MAX_PADDING_TWO if len(groups) <= 2 else MAX_PADDING_MANY
    natural = [-(-group.block_bytes // group.align) * group.align for group in groups]
    largest = max(natural)
    # Groups of equal blocks and alignment cut alike; the largest blocks reject most sizes, so they are asked first.
    distinct = sorted(set(zip((g.block_bytes for g in groups), (g.align for g in groups), strict=True)), reverse=True)
    for extent in _candidates(min(natural), largest, lcm(*(group.align for group in groups))):
        cuts: dict[tuple[int, int], Cut] = {}
        for block_bytes, align in distinct:
            cut = _cut(extent, block_bytes, align, max_padding)
            if cut is None:
                break
            cuts[block_bytes, align] = cut
        else:
            return Geometry(extent, tuple(cuts[group.block_bytes, group.align] for group in groups))
    raise CacheConfigError(
        f"No extent of up to {MAX_BLOCKS_OF_LARGEST} x {largest:,} bytes holds {len(distinct)} block sizes from "
        f"{distinct[-1][0]:,} to {distinct[0][0]:,} bytes with under {max_padding:.1%} padding: change the block "
        "size of a group, lower its alignment, or allow more padding."
    )


def _candidates(smallest: int, largest: int, align: int) -> Iterator[int]:
    """Extent sizes to try, in bytes: first exact for the smallest blocks, then with many divisors, ascending."""
    limit = largest * MAX_BLOCKS_OF_LARGEST
    first = -(-largest // smallest)
    exact = range(first * smallest, limit + 1, smallest)
    yield from exact[:_EXACT_CANDIDATES]
    smooth = (align * number for number in _smooth_numbers(-(-largest // align)))
    for extent in islice(smooth, _SMOOTH_CANDIDATES):
        if extent > limit:
            return
        yield extent


def _cut(extent: int, block_bytes: int, align: int, max_padding: float) -> Cut | None:
    """The least padded cut of ``extent`` by blocks of ``block_bytes``, or None if all pad too much."""
    kept = 1 - Fraction(max_padding).limit_denominator(10**6)
    widest = (kept.denominator * block_bytes - 1) // kept.numerator
    most, fewest = extent // block_bytes, -(-extent // widest)
    narrowest = -(-block_bytes // align) * align
    # Either count slots downwards or widen the stride: whichever list is shorter finds the same first hit.
    if most - fewest <= (widest - narrowest) // align:
        for slots in range(most, max(fewest, 1) - 1, -1):
            if extent % (slots * align) == 0:
                return Cut(block_bytes, extent // slots, slots)
    else:
        for stride in range(narrowest, widest + 1, align):
            if extent % stride == 0:
                return Cut(block_bytes, stride, extent // stride)
    return None


def _smooth_numbers(start: int) -> Iterator[int]:
    """Numbers from ``start`` on whose prime factors are all small, ascending; they have the most divisors."""
    heap: list[tuple[int, int]] = []
    # Each number is generated once: from its largest prime factor upwards. Enter the stream at ``start``.
    stack = [(1, 0)]
    while stack:
        number, first_prime = stack.pop()
        if number >= start:
            heappush(heap, (number, first_prime))
            continue
        stack.extend((number * _SMALL_PRIMES[i], i) for i in range(first_prime, len(_SMALL_PRIMES)))
    while heap:
        number, first_prime = heappop(heap)
        yield number
        for i in range(first_prime, len(_SMALL_PRIMES)):
            heappush(heap, (number * _SMALL_PRIMES[i], i))


@dataclass(frozen=True)
class Share:
    """One group's fixed part of the arena: blocks ``first`` to ``first + blocks - 1``, ``stride`` bytes apart.

    Block b starts at byte ``b x stride`` of the arena, as in an elastic partition; the blocks before ``first``
    would lie in other groups' shares and are never used. Block 0 lies in the null bytes at the arena's start.
    """

    block_bytes: int
    stride: int
    first: int
    blocks: int


def fixed_shares(groups: Sequence[Group], arena_bytes: int, max_requests: int, max_tokens: int) -> tuple[Share, ...]:
    """Cut the arena once and for all: O(1) groups get what ``max_requests`` requests hold, the others the rest.

    The rest is split in proportion to what a request of ``max_tokens`` tokens holds in each group. The null
    blocks of all groups overlay each other at the start of the arena and take the bytes of the largest block.

    Raises:
        CacheConfigError: the O(1) groups alone don't fit, or a group would get no block for a whole request.
    """
    strides = [-(-group.block_bytes // group.align) * group.align for group in groups]
    end = max(strides)
    shares: dict[int, Share] = {}
    for index, group in enumerate(groups):
        if group.constant:
            first = -(-end // strides[index])
            blocks = max_requests * group.blocks_for(max_tokens)
            shares[index] = Share(group.block_bytes, strides[index], first, blocks)
            end = (first + blocks) * strides[index]
    growing = [index for index, group in enumerate(groups) if not group.constant]
    rest = arena_bytes - end
    wanted = {index: groups[index].blocks_for(max_tokens) * strides[index] for index in growing}
    for index in growing:
        part = rest * wanted[index] // sum(wanted.values())
        first = -(-end // strides[index])
        blocks = (min(end + part, arena_bytes) // strides[index]) - first
        if blocks < 1:
            raise CacheConfigError(
                f"A fixed partition of {arena_bytes:,} bytes sets {end:,} aside for the states of {max_requests} "
                "requests, and nothing is left for attention: give it more memory, lower max_num_seqs, or use the "
                "elastic partition."
            )
        shares[index] = Share(groups[index].block_bytes, strides[index], first, blocks)
        end += part
    if end > arena_bytes:
        raise CacheConfigError(
            f"A fixed partition needs {end:,} bytes for the states of {max_requests} requests, more than the "
            f"{arena_bytes:,} there are: give it more memory, lower max_num_seqs, or use the elastic partition."
        )
    return tuple(shares[index] for index in range(len(groups)))
