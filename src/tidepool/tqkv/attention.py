"""Attention of a request's last tokens to all its tokens, read from coded pages.

Tile by tile with a running softmax (Milakov and Gimelshein, arXiv 1805.02867): only one tile of a cache is ever in
float. Tiles are cut by place in the sequence, so that block sizes change nothing, and only places that a request has
written are read: what lies in the rest of a block never matters.
"""

from __future__ import annotations

import torch

from tidepool.tqkv.codec import HeadCodec

QUERY_TILE = 256
KEY_TILE = 512
"""Tokens of a tile."""


def write(pages: torch.Tensor, places: torch.Tensor, key: torch.Tensor, value: torch.Tensor, codec: HeadCodec) -> None:
    """Keep tokens.

    Args:
        pages: ``[blocks, kv heads, block tokens, codec.bytes]`` uint8, of any strides.
        places: for each token block x block tokens + its place in the block; a token with a negative place isn't kept.
        key, value: ``[tokens or more, kv heads, size]``.
    """
    kept = places >= 0
    coded = codec.encode(key[: len(places)][kept], value[: len(places)][kept])
    block, offset = _split(places[kept], pages)
    pages[block, :, offset] = coded


def attend(
    query: torch.Tensor, pages: torch.Tensor, blocks: torch.Tensor, length: int, scale: float, codec: HeadCodec
) -> torch.Tensor:
    """Causal attention of one request's last tokens.

    Args:
        query: ``[tokens, heads, size]``; every KV head serves ``heads / kv heads`` neighbouring heads.
        pages: as in `write`.
        blocks: the request's blocks, in order.
        length: its tokens so far, those of the query included.
        scale: of the scores before the softmax.

    Returns:
        ``[tokens, heads, size]`` float32.
    """
    tokens, heads, size = query.shape
    kv_heads = pages.shape[1]
    rotated = (query.float() @ codec.rotation * scale).view(tokens, kv_heads, -1, size)
    output = torch.cat(
        [
            _attend_tile(tile, pages, blocks, length - tokens + QUERY_TILE * number, codec)
            for number, tile in enumerate(rotated.split(QUERY_TILE))
        ]
    )
    return output.reshape(tokens, heads, size) @ codec.rotation.T


def _attend_tile(
    query: torch.Tensor, pages: torch.Tensor, blocks: torch.Tensor, first: int, codec: HeadCodec
) -> torch.Tensor:
    """`attend` for queries ``[tokens, kv heads, heads of each, size]`` from place ``first`` on, all sides rotated."""
    tokens, kv_heads, share, size = query.shape
    rows = query.permute(1, 2, 0, 3).reshape(kv_heads, share * tokens, size)
    own_places = torch.arange(first, first + tokens).repeat(share)
    mixed = torch.zeros_like(rows)
    total = mixed[..., :1].clone()
    top = torch.full_like(total, -torch.inf)
    for places in torch.arange(first + tokens).split(KEY_TILE):
        index, offset = _split(places, pages)
        tile = pages[blocks[index], :, offset].transpose(0, 1)
        key_norms, value_norms = codec.norms(tile)
        scores = rows @ codec.key_levels(tile).transpose(1, 2) * key_norms.unsqueeze(1)
        scores.masked_fill_(places > own_places.unsqueeze(1), -torch.inf)
        # Every row sees place 0, in the first tile, so that `top` is finite from there on.
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, keep = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * keep + weights.sum(-1, keepdim=True)
        mixed = mixed * keep + weights * value_norms.unsqueeze(1) @ codec.value_levels(tile)
        top = higher
    return (mixed / total).view(kv_heads, share, tokens, size).permute(2, 0, 1, 3)


def _split(places: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, and places in them."""
    block_tokens = pages.shape[2]
    return places // block_tokens, places % block_tokens
