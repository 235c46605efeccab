"""How the arena is divided: one extent size that every group's blocks tile.

All extents are E bytes. Group g divides an extent into ``per_extent`` blocks that lie ``stride`` bytes apart, with

    E = per_extent_g x stride_g        for every group g                                    (1)
    stride_g >= block_bytes_g     and a multiple of the group's alignment              (2)

By (1) block ``extent x per_extent + slot`` starts at byte ``block x stride`` of the arena, so a group's blocks are one
strided view of the whole arena: kernels see an ordinary paged cache, whoever owns which extent.

The waste is the padding, ``1 - block_bytes / stride``. The choice of E trades it against coarseness: memory moves
between groups an extent at a time, so the smallest E that pads little enough is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from tidepool.cache.spec import CacheConfigError, Group, PackedState

MAX_PADDING_TWO = 0.01
"""Padding that every group stays under where there are at most two."""
MAX_PADDING_MANY = 0.02
"""The same where there are more, and an extent of `PATIENCE_MANY` of the largest blocks allows it."""
MAX_PADDING = 0.08
"""Padding that every group stays under in any case."""
MAX_BLOCKS_OF_LARGEST = 128
"""An extent holds at most so many blocks of the group with the largest ones."""
MAX_PADDING_PACKED = 0.5
"""Padding that packed states stay under."""
MAX_BLOCKS_BESIDE_PACKED = 16
"""An extent with packed states holds at most so many of the largest blocks."""
PACKED_SHARE = 0.25
"""Share of a full cache that packed states take, about."""
EXTENT_COST = 0.04
"""What an extent costs for each of the largest blocks in it, as a share of the memory. Chosen by replay: with extents
three times as large so many fewer requests run in a small memory that a queue builds up (docs/packed-states.md)."""
PATIENCE_MANY = 4
"""How many of them, where there are more than two groups, `MAX_PADDING_MANY` is worth."""


@dataclass(frozen=True)
class ExtentLayout:
    """How one group divides an extent into blocks."""

    block_bytes: int
    stride: int
    """Bytes from one block to the next."""
    blocks_per_extent: int
    """Blocks in an extent."""

    @property
    def padding(self) -> float:
        """Share of the stride that holds nothing, 0 to 1."""
        return 1 - self.block_bytes / self.stride


@dataclass(frozen=True)
class Geometry:
    """An extent size and, for each group in order, its layout."""

    extent_bytes: int
    layouts: tuple[ExtentLayout, ...]

    def __post_init__(self) -> None:
        for layout in self.layouts:
            if layout.blocks_per_extent * layout.stride != self.extent_bytes or layout.stride < layout.block_bytes:
                raise CacheConfigError(f"{layout} doesn't tile an extent of {self.extent_bytes:,} bytes.")

    @property
    def padding(self) -> float:
        """The worst group's padding, 0 to 1; groups without a layer have nothing to pad."""
        return max((layout.padding for layout in self.layouts if layout.block_bytes), default=0.0)

    def extents_for(self, blocks: Sequence[int]) -> int:
        """Extents that hold ``blocks[g]`` blocks of each group g, no extent shared."""
        return sum(-(-need // layout.blocks_per_extent) for need, layout in zip(blocks, self.layouts, strict=True))


def choose_geometry(groups: Sequence[Group], *, max_padding: float | None = None) -> Geometry:
    """Choose the smallest extent that pads every group by less than 1% (two groups) or 2% (more), where that is wise.

    Of two block sizes the smaller fills the extent exactly where it can: that group has the most blocks, so padding
    costs the most there. Else tried are the extents that n of the largest blocks fill up to padding, for n = 1, 2, ...

    Dozens of small blocks of odd sizes may stay under 2% in huge extents only, and extents cost too: each group leaves
    the last of its own partly empty. So where there are more than two groups and extents of 4 of the largest blocks
    aren't enough, of the least padded extents for each n that one is chosen whose size x padding is least.
    `Geometry.padding` says what it is.

    Packed states are the exception: they may be padded by more, see `_beside_packed`.

    Args:
        groups: the groups, of any block sizes; those of packed states last.
        max_padding: 0 to 1; the limit in place of these, which then holds in extents of any size.

    Raises:
        CacheConfigError: no extent of up to 128 blocks of the largest group pads by less than ``max_padding``, or 8%.
    """
    if not groups:
        raise CacheConfigError("A geometry needs at least one group.")
    # Groups of equal blocks and alignment have equal layouts.
    if max_padding is None and any(_is_packed(group) for group in groups):
        return _beside_packed(groups)
    kinds = sorted({(group.block_bytes, group.align) for group in groups})
    if max_padding is not None:
        target, limit, patience = max_padding, max_padding, MAX_BLOCKS_OF_LARGEST
    elif len(groups) <= 2:
        target, limit, patience = MAX_PADDING_TWO, MAX_PADDING, MAX_BLOCKS_OF_LARGEST
    else:
        target, limit, patience = MAX_PADDING_MANY, MAX_PADDING, PATIENCE_MANY
    best = _exact_for_smallest(kinds, target) if len(kinds) == 2 else None
    small = (_least_padded(kinds, count, target, enough=target) for count in range(1, patience + 1))
    best = best or next(filter(None, small), None) or (_least_waste(kinds, limit) if limit > target else None)
    if best is None:
        raise CacheConfigError(
            f"No extent of up to {MAX_BLOCKS_OF_LARGEST} x {kinds[-1][0]:,} bytes holds {len(kinds)} block sizes from "
            f"{kinds[0][0]:,} to {kinds[-1][0]:,} bytes with under {limit:.1%} padding: change the block size of a "
            "group, lower its alignment, or allow more padding."
        )
    layouts = dict(zip(kinds, best.layouts, strict=True))
    return Geometry(best.extent_bytes, tuple(layouts[group.block_bytes, group.align] for group in groups))


def choose_stage_geometries(
    stages: Sequence[Sequence[Group]], budgets: Sequence[int], max_tokens: int
) -> tuple[Geometry, ...]:
    """A geometry for every pipeline stage, with the same blocks per extent on all; their bytes may differ.

    One scheduler counts blocks for all stages, so block ids must mean the same extent and place everywhere. The counts
    are those that suit one of the stages best, whichever lets most requests of ``max_tokens`` tokens run on all.

    Args:
        stages: for each stage, the same groups in the same order, with the layers that the stage has of each, which
            may be none.
        budgets: bytes of KV memory of each stage.
        max_tokens: tokens of the longest request.

    Raises:
        CacheConfigError: no extent size suits the groups; see `choose_geometry`.
    """
    if len(stages) == 1:
        return (choose_geometry(stages[0]),)
    complete = [groups for groups in stages if all(group.layers for group in groups)]
    # Where no stage has layers of every group, the whole model's proportions have to do.
    whole = [replace(same[0], layers=sum((g.layers for g in same), ())) for same in zip(*stages, strict=True)]
    best: tuple[Geometry, ...] = ()
    most = float("-inf")
    for reference in complete or [whole]:
        per_extent = [layout.blocks_per_extent for layout in choose_geometry(reference).layouts]
        geometries = tuple(geometry_by_counts(groups, per_extent) for groups in stages)
        extents = min(budget // each.extent_bytes for budget, each in zip(budgets, geometries, strict=True))
        request = sum(group.blocks_for(max_tokens) / count for group, count in zip(whole, per_extent, strict=True))
        if (requests := (extents - 1) / request) > most:
            best, most = geometries, requests
    return best


def geometry_by_counts(groups: Sequence[Group], per_extent: Sequence[int]) -> Geometry:
    """The geometry of the smallest extent that holds ``per_extent[g]`` blocks of every group g."""
    step = lcm(*(count * group.align for group, count in zip(groups, per_extent, strict=True)))
    need = max(count * group.block_bytes for group, count in zip(groups, per_extent, strict=True))
    extent = max(1, -(-need // step)) * step
    pairs = zip(groups, per_extent, strict=True)
    return Geometry(extent, tuple(ExtentLayout(group.block_bytes, extent // count, count) for group, count in pairs))


def _is_packed(group: Group) -> bool:
    return isinstance(group.cache, PackedState)


def _beside_packed(groups: Sequence[Group]) -> Geometry:
    """The geometry with the least waste where some groups are of packed states.

    Those may be padded by more than the others, since an extent that fits them, too, may hold a dozen states. They take
    about a quarter of a full cache (`PACKED_SHARE`), so their padding counts by that. Large extents cost, too: each
    group leaves some partly empty, and admission counts whole ones (`EXTENT_COST`).

    Raises:
        CacheConfigError: no extent suits the other groups.
    """
    plain = [group for group in groups if not _is_packed(group)]
    kinds = sorted({(group.block_bytes, group.align) for group in plain})
    packed = sorted({(group.block_bytes, group.align) for group in groups if _is_packed(group)})
    best: tuple[float, Geometry] | None = None
    for bound in (MAX_PADDING / 2, MAX_PADDING):
        for count in range(1, MAX_BLOCKS_BESIDE_PACKED + 1):
            if best and count * EXTENT_COST >= best[0]:
                break
            for extent in dict.fromkeys(_extents(kinds, count, _always(bound))):
                layouts = _layouts(extent, kinds, bound)
                if layouts is None:
                    continue
                found = (_layout(extent, *kind, MAX_PADDING_PACKED) for kind in packed)
                fitting = [layout for layout in found if layout and layout.blocks_per_extent > count]
                if len(fitting) < len(packed):
                    continue
                padding = max(layout.padding for layout in fitting)
                waste = max(each.padding for each in layouts.values()) + PACKED_SHARE * padding + count * EXTENT_COST
                if best is None or waste < best[0]:
                    all_layouts = layouts | dict(zip(packed, fitting, strict=True))
                    in_order = tuple(all_layouts[group.block_bytes, group.align] for group in groups)
                    best = waste, Geometry(extent, in_order)
        if best:
            return best[1]
    raise CacheConfigError(
        f"No extent of up to {MAX_BLOCKS_BESIDE_PACKED} x {kinds[-1][0]:,} bytes holds these block sizes with under "
        f"{MAX_PADDING:.1%} padding beside packed states: leave out checkpoint_states, or change a group's block size."
    )


def _always(bound: float) -> Callable[[], float]:
    """A bound that stays as it is."""
    return lambda: bound


def _extents(kinds: Sequence[tuple[int, int]], count: int, bound: Callable[[], float]) -> Iterator[int]:
    """Extents that ``count`` of the largest blocks fill up to padding under ``bound``, which is asked before each.

    Exact: every such extent is a multiple of some stride of the smallest blocks, and all of those are tried.
    """
    (smallest, align), (largest, largest_align) = kinds[0], kinds[-1]
    first = count * _round_up(largest, largest_align)
    stride = _round_up(smallest, align)
    while 1 - smallest / stride < bound():
        step = lcm(stride, count * largest_align)
        extent = _round_up(first, step)
        while 1 - count * largest / extent < bound():
            yield extent
            extent += step
        stride += align


def _exact_for_smallest(kinds: Sequence[tuple[int, int]], bound: float) -> Geometry | None:
    """The smallest extent that the smaller of two blocks fills exactly, the larger padded by less than ``bound``."""
    (small, small_align), (large, large_align) = kinds
    if small % small_align:
        return None
    for count in range(1, MAX_BLOCKS_OF_LARGEST + 1):
        extent = -(-count * large // small) * small
        stride, rest = divmod(extent, count)
        if not rest and not stride % large_align and stride - large < bound * stride:
            return Geometry(extent, (ExtentLayout(small, small, extent // small), ExtentLayout(large, stride, count)))
    return None


def _least_waste(kinds: Sequence[tuple[int, int]], limit: float) -> Geometry | None:
    """Of the extents that `_least_padded` finds, padding under ``limit``, the one whose size x padding is least."""
    best: Geometry | None = None
    for count in range(1, MAX_BLOCKS_OF_LARGEST + 1):
        if best is not None:
            bounds = [min(limit, best.padding * best.extent_bytes / (count * kinds[-1][0]))]
        else:
            bounds = [limit / 2, limit]  # A search takes as long as the square of its bound.
        found = next(filter(None, (_least_padded(kinds, count, bound, enough=0.0) for bound in bounds)), None)
        if found is not None and (
            best is None or found.padding * found.extent_bytes < best.padding * best.extent_bytes
        ):
            best = found
    return best


def _least_padded(kinds: Sequence[tuple[int, int]], count: int, bound: float, enough: float) -> Geometry | None:
    """The least padded extent that ``count`` of the largest blocks fill up to padding, or the first that is enough.

    A result lowers the bound for those that follow, so few remain.

    Args:
        kinds: block bytes and alignment of each group, ascending.
        count: blocks of the largest kind in an extent.
        bound: padding, 0 to 1, that every kind must stay under.
        enough: padding below which nothing better is looked for.
    """
    # Whoever has the fewest strides (or counts) to try is asked first.
    order = sorted(kinds, key=lambda kind: min(kind[0] / kind[1], kinds[-1][0] / max(1, kind[0])))
    best: Geometry | None = None

    def lowered() -> float:
        return bound

    for extent in _extents(kinds, count, lowered):
        layouts = _layouts(extent, order, bound)
        if layouts is not None:
            best = Geometry(extent, tuple(layouts[kind] for kind in kinds))
            bound = best.padding
            if bound < enough or not bound:
                return best
    return best


def _layouts(extent: int, kinds: Sequence[tuple[int, int]], bound: float) -> dict[tuple[int, int], ExtentLayout] | None:
    """The least padded layout of ``extent`` for every kind, or None if one can't be padded by less than ``bound``."""
    layouts = {}
    for kind in kinds:
        layout = _layout(extent, *kind, bound)
        if layout is None:
            return None
        layouts[kind] = layout
    return layouts


def _layout(extent: int, block_bytes: int, align: int, bound: float) -> ExtentLayout | None:
    """The least padded layout of ``extent`` by blocks of ``block_bytes``, or None if all pad by ``bound`` or more."""
    narrowest, widest = _round_up(block_bytes, align), int(block_bytes / (1 - bound)) + 1
    most, fewest = extent // narrowest, max(1, extent // widest)
    layout: ExtentLayout | None = None
    # Either count blocks downwards or widen the stride: whichever list is shorter finds the same first hit.
    if most - fewest <= (widest - narrowest) // align:
        counts = range(most, fewest - 1, -1)
        layout = next((ExtentLayout(block_bytes, extent // n, n) for n in counts if extent % (n * align) == 0), None)
    else:
        strides = range(narrowest, widest + 1, align)
        stride = next((stride for stride in strides if extent % stride == 0), None)
        layout = ExtentLayout(block_bytes, stride, extent // stride) if stride else None
    return layout if layout and layout.padding < bound else None


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


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
    """Divide the arena once and for all: O(1) groups get what ``max_requests`` requests hold, the others the rest.

    The rest is split in proportion to what a request of ``max_tokens`` tokens holds in each group. The null
    blocks of all groups overlay each other at the start of the arena and take the bytes of the largest block.

    Raises:
        CacheConfigError: the O(1) groups alone don't fit, or a group would get no block for a whole request.
    """
    return fixed_stage_shares([groups], [arena_bytes], max_requests, max_tokens)[0]


def fixed_stage_shares(
    stages: Sequence[Sequence[Group]], arena_bytes: Sequence[int], max_requests: int, max_tokens: int
) -> list[tuple[Share, ...]]:
    """`fixed_shares` of every pipeline stage, with the same block ids on all: ``first`` and ``blocks`` are equal.

    Args:
        stages: for each stage, the same groups in the same order, with the layers that the stage has of each.
        arena_bytes: of each stage.
        max_requests, max_tokens: as in `fixed_shares`.

    Raises:
        CacheConfigError: as `fixed_shares`, for any stage.
    """
    strides = [[_round_up(group.block_bytes, group.align) for group in groups] for groups in stages]
    constant, ends = _constant_places(stages[0], strides, max_requests, max_tokens)
    growing, ends = _growing_places(stages[0], strides, ends, arena_bytes, max_requests, max_tokens)
    for end, total in zip(ends, arena_bytes, strict=True):
        if end > total:
            raise CacheConfigError(
                f"A fixed partition needs {end:,} bytes for the states of {max_requests} requests, more than the "
                f"{total:,} there are: give it more memory, lower max_num_seqs, or use the elastic partition."
            )
    places = constant | growing
    return [
        tuple(Share(group.block_bytes, row[index], *places[index]) for index, group in enumerate(groups))
        for groups, row in zip(stages, strides, strict=True)
    ]


_Places = dict[int, tuple[int, int]]
"""By group: the first of its blocks, and how many there are."""


def _constant_places(
    groups: Sequence[Group], strides: Sequence[Sequence[int]], max_requests: int, max_tokens: int
) -> tuple[_Places, list[int]]:
    """Places of the O(1) groups, one after the other behind the null blocks, and where they end on every stage."""
    places: _Places = {}
    ends = [max(row) for row in strides]
    for index, group in enumerate(groups):
        if group.constant:
            first, blocks = _first_block(index, strides, ends), max_requests * group.blocks_for(max_tokens)
            places[index] = (first, blocks)
            ends = [max(end, (first + blocks) * row[index]) for end, row in zip(ends, strides, strict=True)]
    return places, ends


def _growing_places(
    groups: Sequence[Group],
    strides: Sequence[Sequence[int]],
    ends: Sequence[int],
    arena_bytes: Sequence[int],
    max_requests: int,
    max_tokens: int,
) -> tuple[_Places, list[int]]:
    """Places of the other groups behind ``ends``, each with its part of what is left, and where they end."""
    places: _Places = {}
    growing = [index for index, group in enumerate(groups) if not group.constant]
    wanted = [{index: groups[index].blocks_for(max_tokens) * row[index] for index in growing} for row in strides]
    rests = [total - end for total, end in zip(arena_bytes, ends, strict=True)]
    for index in growing:
        first = _first_block(index, strides, ends)
        parts = [rest * want[index] // (sum(want.values()) or 1) for rest, want in zip(rests, wanted, strict=True)]
        counts = {
            stage: min(ends[stage] + parts[stage], arena_bytes[stage]) // row[index] - first
            for stage, row in enumerate(strides)
            if row[index]
        }
        tightest = min(counts, key=counts.__getitem__)
        if counts[tightest] < 1:
            raise CacheConfigError(
                f"A fixed partition of {arena_bytes[tightest]:,} bytes sets {ends[tightest]:,} aside for the states of "
                f"{max_requests} requests, and nothing is left for attention: give it more memory, lower max_num_seqs, "
                "or use the elastic partition."
            )
        places[index] = (first, counts[tightest])
        ends = [end + part for end, part in zip(ends, parts, strict=True)]
    return places, list(ends)


def _first_block(index: int, strides: Sequence[Sequence[int]], ends: Sequence[int]) -> int:
    """The first block of a group that starts behind ``ends`` on all stages that have its layers."""
    return max(-(-end // row[index]) for end, row in zip(ends, strides, strict=True) if row[index])
