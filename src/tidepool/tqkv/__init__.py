"""tqkv: a compressed KV cache. Keys and values as packed codes of 2, 3, 4 or 8 bits a number, and a 4-byte norm each.

A page has any size but a power of two, which is what tidepool's natural pages are for. `formats` names the formats and
counts bytes, and needs nothing; `codebook`, `packing`, `codec` and `attention` are the numerics, in torch; `backend`
is vLLM's attention backend. docs/tqkv.md says how well the answers survive.
"""
