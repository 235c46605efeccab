"""What layers keep: bytes of pages, and blocks of a request."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings, strategies as st

from tidepool.cache import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    SlidingWindow,
    State,
    block_align,
    group_layers,
)


@pytest.mark.parametrize(
    ("cache", "page_bytes", "blocks"),
    [
        (FullAttention(7), 7 * 16, {1: 1, 16: 1, 17: 2, 1_000: 63}),
        (SlidingWindow(7, window=48), 7 * 16, {1: 1, 17: 2, 64: 4, 1_000: 4}),
        (SlidingWindow(7, window=33, step_tokens=16), 7 * 16, {64: 4, 65: 4, 1_000: 4}),
        (State(7), 7, {1: 1, 1_000: 1}),
        (State(7, copies=3), 7, {1: 3, 1_000: 3}),
    ],
)
def test_pages_are_of_natural_size_and_requests_hold_what_they_need(
    cache: LayerCache, page_bytes: int, blocks: dict[int, int]
) -> None:
    group = Group(cache, ("a", "b", "c"), 16)
    assert (group.page_bytes, group.block_bytes) == (page_bytes, 3 * page_bytes)
    assert {tokens: group.blocks_for(tokens) for tokens in blocks} == blocks


@settings(max_examples=300)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 100), st.integers(1, 12))
def test_a_window_gets_the_blocks_that_it_ever_touches(window: int, step: int, tokens: int, block: int) -> None:
    """And one more at most: where it always ends at a block's end, or the sequence is too short to lie badly."""
    touched = max(
        (min(done + step, tokens) - 1) // block - max(done - window + 1, 0) // block + 1 for done in range(tokens)
    )
    said = Group(SlidingWindow(1, window, step), ("l",), block).blocks_for(tokens)
    held = window - 1 + step
    exact = tokens <= held or (tokens >= held + block and (held - 1) % block > 0)
    assert touched <= said <= touched + (not exact)


@pytest.mark.parametrize("wrong", [0, -1])
def test_nothing_takes_no_bytes_or_tokens(wrong: int) -> None:
    cache = FullAttention(1)
    for make in (
        lambda value: FullAttention(value),
        lambda value: State(value),
        lambda value: State(1, value),
        lambda value: SlidingWindow(value, 1),
        lambda value: SlidingWindow(1, value),
        lambda value: SlidingWindow(1, 1, value),
        lambda value: Group(cache, ("l",), value),
        lambda value: Group(cache, ("l",), 1, value),
        lambda value: Group(cache, ("l",), 1).with_kernel_block(value),
    ):
        make(1)
        with pytest.raises(CacheConfigError, match="must be positive"):
            make(wrong)


def test_layers_with_equal_caches_are_a_group_in_the_order_of_their_first() -> None:
    attention, state = FullAttention(4), State(100)
    layers: dict[str, LayerCache] = {"s0": state, "a0": attention, "s1": State(100), "w": SlidingWindow(4, 9)}
    expected = [(("s0", "s1"), 16, 1), (("a0",), 16, 1), (("w",), 16, 1)]
    assert [(g.layers, g.block_tokens, g.align) for g in group_layers(layers, 16)] == expected
    expected = [(("s0", "s1"), 512, 32), (("a0",), 16, 32), (("w",), 16, 32)]
    groups = group_layers(layers, 16, align=32, state_block_tokens=512)
    assert [(g.layers, g.block_tokens, g.align) for g in groups] == expected


@given(st.integers(1, 1 << 20))
def test_blocks_lie_as_pages_do_between_16_and_64_bytes(page: int) -> None:
    align = block_align(page)
    assert align == max(size for size in (16, 32, 64) if size == 16 or page % size == 0)


def test_a_page_may_be_larger_than_natural_and_never_smaller() -> None:
    assert Group(FullAttention(10), ("l",), 16, page_bytes=160).page_bytes == 160
    assert Group(FullAttention(10), ("l",), 16, page_bytes=161).page_bytes == 161
    with pytest.raises(CacheConfigError, match=r"needs 160 bytes in each layer, but the page of group 'l' has 1:"):
        Group(FullAttention(10), ("l",), 16, page_bytes=1)


@given(st.integers(1, 100), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_a_block_is_rounded_up_to_whole_kernel_blocks(per_token: int, tokens: int, kernel: int, room: int) -> None:
    """A natural page grows with its block; a declared one stays, or the block doesn't fit."""
    rounded = ceil(tokens / kernel) * kernel
    page = (tokens + room) * per_token
    group = Group(FullAttention(per_token), ("l",), tokens, page_bytes=page)
    if room and room < rounded - tokens:
        with pytest.raises(CacheConfigError, match="use smaller blocks or a larger page"):
            group.with_kernel_block(kernel)
    else:
        larger = group.with_kernel_block(kernel)
        assert (larger.block_tokens, larger.page_bytes) == (rounded, page if room else rounded * per_token)


def test_a_state_has_no_kernel_blocks() -> None:
    group = Group(State(7), ("l",), 12)
    assert group.with_kernel_block(16) == group
