"""Attention over coded pages, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tidepool.tqkv import attention
from tidepool.tqkv.attention import attend, write
from tidepool.tqkv.codec import HeadCodec
from tidepool.tqkv.error import expected_error
from tidepool.tqkv.formats import FORMATS, Format

NAN_BYTE = 0xFF
"""Bytes of a poisoned page: as norms they are NaN."""


@dataclass
class Cache:
    """A request's tokens in poisoned pages, whose blocks lie in any order and at odd distances."""

    codec: HeadCodec
    key: torch.Tensor
    value: torch.Tensor
    pages: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def of(cls, form: Format, tokens: int, kv_heads: int, size: int, block_tokens: int, seed: int = 0) -> Cache:
        random = torch.Generator().manual_seed(seed)
        codec = HeadCodec(form, size)
        count = tokens // block_tokens + 3
        page = kv_heads * block_tokens * codec.bytes
        arena = torch.full((count * (page + 7),), NAN_BYTE, dtype=torch.uint8)
        shape = (count, kv_heads, block_tokens, codec.bytes)
        pages = arena.as_strided(shape, (page + 7, block_tokens * codec.bytes, codec.bytes, 1), 3)
        key, value = torch.randn(2, tokens, kv_heads, size, generator=random).unbind()
        return cls(codec, key, value, pages, torch.randperm(count - 1, generator=random) + 1)

    def places(self, first: int, last: int) -> torch.Tensor:
        tokens, size = torch.arange(first, last), self.pages.shape[2]
        return self.blocks[tokens // size] * size + tokens % size

    def write(self, first: int, last: int) -> None:
        write(self.pages, self.places(first, last), self.key[first:last], self.value[first:last], self.codec)

    def attend(self, query: torch.Tensor, length: int) -> torch.Tensor:
        return attend(query, self.pages, self.blocks, length, query.shape[-1] ** -0.5, self.codec)

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the codes have them."""
        coded = self.codec.encode(self.key, self.value)
        key_norms, value_norms = self.codec.norms(coded)
        key = key_norms.unsqueeze(-1) * self.codec.key_levels(coded)
        value = value_norms.unsqueeze(-1) * self.codec.value_levels(coded)
        return key @ self.codec.rotation.T, value @ self.codec.rotation.T


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of the last tokens, in float64, with all scores at once."""
    share, tokens = query.shape[1] // key.shape[1], len(key)
    key, value = (each.double().repeat_interleave(share, 1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * query.shape[-1] ** -0.5
    own = torch.arange(tokens - len(query), tokens).unsqueeze(1)
    scores.masked_fill_(torch.arange(tokens) > own, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@settings(max_examples=60)
@given(
    st.sampled_from(list(FORMATS.values())),
    st.integers(1, 90),
    st.data(),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([8, 24, 64]),
    st.sampled_from([1, 16, 40]),
)
def test_it_is_the_attention_to_what_the_codes_say(
    form: Format, tokens: int, data: st.DataObject, kv_heads: int, share: int, size: int, block_tokens: int
) -> None:
    """Any lengths, chunks, heads and blocks; nothing but the tokens written matters, as all else is NaN."""
    cache = Cache.of(form, tokens, kv_heads, size, block_tokens, seed=tokens)
    query = torch.randn(tokens, kv_heads * share, size, generator=torch.Generator().manual_seed(1))
    expected = plain_attention(query, *cache.decoded())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEY_TILE", data.draw(st.sampled_from([1, 7, 64]), "key tile"))
        patch.setattr(attention, "QUERY_TILE", data.draw(st.sampled_from([1, 5, 64]), "query tile"))
        first = 0
        while first < tokens:
            last = first + data.draw(st.integers(1, tokens - first), "chunk")
            cache.write(first, last)
            output = cache.attend(query[first:last], last)
            assert torch.allclose(output.double(), expected[first:last], atol=2e-5)
            first = last


def test_blocks_and_neighbours_change_no_bit() -> None:
    """Stock vLLM's blocks are larger than tidepool's, and outputs are the same."""
    query = torch.randn(1200, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = []
    for block_tokens in (16, 48, 2432):
        cache = Cache.of(FORMATS["tqkv-k3v4"], 1200, 2, 64, block_tokens)
        cache.write(0, 1200)
        outputs.append(cache.attend(query, 1200))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_token_without_a_place_is_not_kept() -> None:
    cache = Cache.of(FORMATS["tqkv-k8v8"], 3, 1, 8, 4)
    before = cache.pages.clone()
    places = cache.places(0, 2)
    places[0] = -1
    write(cache.pages, places, cache.key, cache.value, cache.codec)
    changed = (cache.pages != before).any(-1).nonzero().tolist()
    assert changed == [[int(cache.blocks[0]), 0, 1]]
    write(cache.pages, torch.tensor([0]), cache.key, cache.value, cache.codec)
    assert (cache.pages[0, 0, 0] != before[0, 0, 0]).any(), "0 is a place"


@pytest.mark.parametrize(
    ("key_bits", "value_bits"),
    [(8, 2), (8, 4), (8, 8), (2, 8), (4, 8), (2, 2), (3, 3), (4, 4)],
)
@pytest.mark.parametrize("size", [64, 256])
def test_outputs_are_as_wrong_as_theory_says(key_bits: int, value_bits: int, size: int) -> None:
    tokens, asked, form = 1_000, 256, Format(key_bits, value_bits)
    cache = Cache.of(form, tokens, 1, size, 16)
    cache.write(0, tokens)
    query = torch.randn(asked, size, generator=torch.Generator().manual_seed(2))
    output, expected = expected_error(query, cache.key[:, 0], cache.value[:, 0], size**-0.5, form)
    exact = plain_attention(query.unsqueeze(1), cache.key, cache.value)[:, 0]
    assert torch.allclose(output.double(), exact, atol=1e-5)
    errors = (cache.attend(query.unsqueeze(1), tokens)[:, 0] - exact).square().sum(-1)
    assert 0.8 < float(errors.mean() / expected.mean()) < 1.15


def test_what_many_values_have_in_common_survives() -> None:
    """Errors aren't correlated with the vectors, so that a mean over many tokens is nearly right, even of 2 bits.

    With plain lengths for norms it would be too small by the distortion, 12%.
    """
    cache = Cache.of(FORMATS["tqkv-k8v2"], 4_000, 1, 64, 16)
    cache.value[:] = cache.value + 2 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    cache.write(0, 4_000)
    output = cache.attend(torch.zeros(1, 1, 64), 4_000).flatten()
    common = cache.value.mean((0, 1))
    assert float((output @ common) / (common @ common)) == pytest.approx(1, abs=0.02)
