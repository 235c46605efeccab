"""Bytes of what a cache stores, by data type.

The packed layouts are those of vLLM 0.32's attention backends: Triton (per-token-head scales), FlashInfer
(NVFP4) and TurboQuant, and those of `tidepool.tqkv`; each function names the formula.
"""

from __future__ import annotations

from tidepool.models.config import ModelConfigError
from tidepool.tqkv.formats import FORMATS

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number, by floating point type."""

PER_TOKEN_HEAD_BITS = {"int8_per_token_head": 8, "fp8_per_token_head": 8, "int4_per_token_head": 4}
"""Bits of one number where every head of every token has its own fp32 scale."""

TURBOQUANT_BITS = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
"""Bits of a key and of a value; keys of under 8 bits come with a 2-byte norm."""

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")

KV_DTYPES = (
    "auto",
    "bfloat16",
    "float16",
    *_FP8,
    *PER_TOKEN_HEAD_BITS,
    *TURBOQUANT_BITS,
    "nvfp4",
    *FORMATS,
)
"""KV cache types that attention layers can be planned with."""

COMPARED_KV_DTYPES = tuple(
    name for name in KV_DTYPES if name not in FORMATS or FORMATS[name].key_bits == FORMATS[name].value_bits
)
"""Those that a plan compares: of tqkv's only the formats with as many bits for keys as for values."""

STATE_DTYPES = ("auto", *FLOAT_BYTES)
"""Types of the recurrent part of a state."""


def head_bytes(kv_dtype: str, key_size: int, value_size: int, model_bytes: int) -> int:
    """Bytes that one KV head keeps for one token.

    Args:
        kv_dtype: one of `KV_DTYPES`, or the answer itself for any other format, like ``528B``.
        key_size: numbers in a key.
        value_size: numbers in a value.
        model_bytes: bytes of one number of the model's own type, which ``auto`` means.
    """
    numbers = key_size + value_size
    if kv_dtype == "auto":
        return numbers * model_bytes
    if kv_dtype in FLOAT_BYTES:
        return numbers * FLOAT_BYTES[kv_dtype]
    if kv_dtype in _FP8:
        return numbers
    if kv_dtype in PER_TOKEN_HEAD_BITS:  # codes, then one fp32 scale for the key and one for the value
        bits = PER_TOKEN_HEAD_BITS[kv_dtype]
        return key_size * bits // 8 + value_size * bits // 8 + 2 * 4
    if kv_dtype == "nvfp4":  # two numbers a byte, and an fp8 scale for every 16
        return sum(size // 2 + size // 16 for size in (key_size, value_size))
    if kv_dtype in TURBOQUANT_BITS:  # codes, a key's norm, a value's scale and zero point; rounded up to even
        key_bits, value_bits = TURBOQUANT_BITS[kv_dtype]
        key = key_size if key_bits == 8 else -(-key_size * key_bits // 8) + 2
        packed = key + -(-value_size * value_bits // 8) + 4
        return packed + packed % 2
    if kv_dtype in FORMATS:
        return FORMATS[kv_dtype].head_bytes(key_size, value_size)
    if kv_dtype.endswith("B") and kv_dtype[:-1].isdecimal() and int(kv_dtype[:-1]):
        return int(kv_dtype[:-1])
    raise unknown("KV cache dtype", kv_dtype, KV_DTYPES)


def latent_bytes(kv_dtype: str, size: int, model_bytes: int) -> int:
    """Bytes that a latent attention (MLA) layer keeps for one token: one vector of ``size`` numbers.

    Raises:
        ModelConfigError: the dtype packs keys and values of heads, which a latent vector doesn't have.
    """
    if kv_dtype in PER_TOKEN_HEAD_BITS or kv_dtype in TURBOQUANT_BITS or kv_dtype == "nvfp4" or kv_dtype in FORMATS:
        raise ModelConfigError(
            f"The KV cache dtype {kv_dtype} packs keys and values head by head, and this model's latent "
            "attention keeps neither: use auto, bfloat16 or fp8."
        )
    return head_bytes(kv_dtype, size, 0, model_bytes)


def state_bytes(dtype: str, default: str) -> int:
    """Bytes of one number of a recurrent state; ``auto`` means ``default``."""
    chosen = default if dtype == "auto" else dtype
    if chosen not in FLOAT_BYTES:
        raise unknown("state dtype", chosen, STATE_DTYPES)
    return FLOAT_BYTES[chosen]


def unknown(what: str, name: str, known: tuple[str, ...]) -> ModelConfigError:
    """An error that says what there is instead."""
    return ModelConfigError(f"There is no {what} {name!r}: choose from {', '.join(known)}.")
