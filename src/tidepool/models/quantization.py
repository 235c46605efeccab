"""How a checkpoint stores its matrices: which of them are quantized, and to how many bytes.

Read from ``quantization_config`` of a ``config.json``, or from ModelOpt's ``hf_quant_config.json``. Kinds that aren't
known here are an error as soon as somebody asks for bytes, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from tidepool.models.config import ModelConfigError
from tidepool.models.weights import Linear


@dataclass(frozen=True)
class Format:
    """How one matrix is stored: codes, and what turns them back into numbers."""

    bits: float
    """Of a code."""
    group: int | None = None
    """Inputs that share a scale; 0 for all inputs of an output, None for the whole matrix."""
    scale_bits: float = 16
    zero_bits: float = 0
    """Of a zero point, one beside each scale."""
    outputs: int = 1
    """Outputs that share a scale."""
    input_bits: float = 0
    """Beside each input, like GPTQ's order of activations."""

    def bytes(self, linear: Linear) -> float:
        """Bytes of a matrix, or of all alike."""
        scales = 1
        if self.group is not None:
            scales = -(-linear.outputs // self.outputs) * (-(-linear.inputs // self.group) if self.group else 1)
        codes = linear.inputs * linear.outputs * self.bits
        per_matrix = codes + scales * (self.scale_bits + self.zero_bits) + linear.inputs * self.input_bits
        return linear.count * per_matrix / 8


NVFP4 = Format(4, 16, scale_bits=8)
MXFP4 = Format(4, 32, scale_bits=8)
FP8_BLOCK = Format(8, 128, scale_bits=32, outputs=128)
MODELOPT = {
    "FP8": Format(8, None, scale_bits=32),
    "FP8_PER_CHANNEL_PER_TOKEN": Format(8, 0, scale_bits=32),
    "FP8_PB_WO": FP8_BLOCK,
    "FP8_BLOCK_SCALES": FP8_BLOCK,
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W4A8_NVFP4_FP8": NVFP4,
    "MXFP4": MXFP4,
    "W4A8_MXFP4_FP8": MXFP4,
    "MXFP8": Format(8, 32, scale_bits=8),
    "W4A16_AWQ": Format(4, 128),
    "W4A8_AWQ": Format(4, 128),
    "INT4_AWQ": Format(4, 128),
    "W8A16": Format(8, 0),
    "W8A8_SQ_PER_CHANNEL": Format(8, 0, scale_bits=32),
}
"""NVIDIA ModelOpt's names of formats."""

_NOT_QUANTIZED = ("UNQUANTIZED", "NONE", "")
_LAYERS = (
    "layers",
    "model.layers",
    "backbone.layers",
    "language_model.layers",
    "language_model.model.layers",
    "language_model.backbone.layers",
    "model.language_model.layers",
)
"""What comes before the number of a layer in a checkpoint's names."""
_DRAFTS = ("mtp.layers",)
"""What comes before the number of a layer that drafts."""
_EXPERT_CLASSES = ("FusedMoE", "RoutedExperts", "MoE")
_FUSED = {
    "q_proj": ("qkv_proj",),
    "k_proj": ("qkv_proj",),
    "v_proj": ("qkv_proj",),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
    "in_proj_qkv": ("in_proj_qkvz",),
    "in_proj_z": ("in_proj_qkvz",),
    "in_proj_a": ("in_proj_ba",),
    "in_proj_b": ("in_proj_ba",),
}
"""Matrices that vLLM makes one of, whose name a checkpoint may list instead."""


def names_of(linear: Linear, layer: int | None, before: Sequence[str] = _LAYERS) -> list[str]:
    """Names that a checkpoint may call a matrix by, all its parents included.

    Args:
        linear: the matrix.
        layer: the number of its layer; None for what lies outside of layers, which is called by its name alone.
        before: what may come before the number.
    """
    inside = [linear.name]
    parent, _, projection = linear.name.rpartition(".")
    fused = _FUSED.get(projection, ())
    if linear.expert:
        inside.append(f"{parent}.0.{projection}")
        fused = ("gate_up_proj",)
    inside += [f"{parent}.{name}" for name in fused]
    if layer is None:
        return inside
    return [f"{prefix}.{layer}.{name}" for prefix in before for name in inside]


@dataclass(frozen=True)
class Patterns:
    """Names of modules as checkpoints list them: plain, with wildcards, or as regular expressions after ``re:``."""

    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            self._regular  # noqa: B018
        except re.error as error:
            raise ModelConfigError(f"The quantization config has a bad regular expression: {error}.") from error

    def match(self, names: Sequence[str]) -> bool:
        """Whether one of the names, or a part of it from dot to dot, is listed."""
        return (
            any(part in self._plain for name in names for part in _parts(name))
            or any(fnmatchcase(name, pattern) for pattern in self._wild for name in names)
            or any(pattern.match(name) for pattern in self._regular for name in names)
        )

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(text for text in self.texts if not text.startswith("re:") and "*" not in text)

    @cached_property
    def _wild(self) -> list[str]:
        return [text for text in self.texts if not text.startswith("re:") and "*" in text]

    @cached_property
    def _regular(self) -> list[re.Pattern[str]]:
        return [re.compile(text[3:]) for text in self.texts if text.startswith("re:")]


def patterns(names: Iterable[object]) -> Patterns:
    """Those of the names that are texts."""
    return Patterns(tuple(name for name in names if isinstance(name, str)))


def _parts(name: str) -> Iterable[str]:
    words = name.split(".")
    for first in range(len(words)):
        for end in range(first + 1, len(words) + 1):
            yield ".".join(words[first:end])


@dataclass(frozen=True)
class Quantization:
    """The formats of a checkpoint's matrices; without rules, all are of the model's own type."""

    rules: tuple[tuple[Patterns | Callable[[Linear], bool], Format | None], ...] = ()
    """Which matrices have which format; the first that matches counts, and None is the model's own type."""
    kept: Patterns = Patterns()
    """Those that are left as they are."""
    beyond: bool = False
    """Whether output embedding and vision tower are quantized where nothing says otherwise."""
    drafts: bool = False
    """Whether layers of the head that drafts are quantized like the others."""
    unknown: str | None = None
    """The name of a kind that isn't known here."""
    kv_dtype: str | None = None
    """The KV cache dtype that vLLM takes ``auto`` for, where the checkpoint names one."""

    def format_of(self, linear: Linear, layer: int | None, *, draft: bool = False) -> Format | None:
        """The format of a matrix, None for the model's own type.

        Args:
            linear: the matrix.
            layer: the number of its layer; None for what lies outside of layers.
            draft: whether the layer is one of the head that drafts.

        Raises:
            ModelConfigError: it is of a kind that isn't known here.
        """
        if self.unknown is not None:
            raise ModelConfigError(
                f"The checkpoint is quantized in a way that isn't known here ({self.unknown}): give the weights on one "
                "device with --weights."
            )
        if not self.rules or linear.router or (layer is None and not self.beyond) or (draft and not self.drafts):
            return None
        names = names_of(linear, layer, _DRAFTS if draft else _LAYERS)
        if self.kept.match(names):
            return None
        for rule, chosen in self.rules:
            if rule.match(names) if isinstance(rule, Patterns) else rule(linear):
                return chosen
        return None

    def bytes(self, linear: Linear, layer: int | None, model_bytes: int, *, draft: bool = False) -> float:
        """Bytes of a matrix, see `format_of`; ``model_bytes`` is one number of the model's own type."""
        chosen = self.format_of(linear, layer, draft=draft)
        return linear.parameters * model_bytes if chosen is None else chosen.bytes(linear)


def read_quantization(table: Mapping[str, Any]) -> Quantization:
    """Read a ``quantization_config``; an empty one is a checkpoint that isn't quantized."""
    if not table:
        return Quantization()
    method = _method(table)
    reader = _modelopt if method.startswith("modelopt") else _READERS.get(method)
    try:
        found = reader(table) if reader else None
    except (TypeError, ValueError, AttributeError, KeyError):
        found = None
    found = found or Quantization(unknown=str(method or "no quant_method"))
    if method.startswith("modelopt"):
        return replace(found, kv_dtype=_modelopt_kv_dtype(table))
    # vLLM takes any scheme of these for fp8.
    named = method == "compressed-tensors" and table.get("kv_cache_scheme") is not None
    return replace(found, kv_dtype="fp8") if named else found


def _modelopt_kv_dtype(table: Mapping[str, Any]) -> str | None:
    """The KV cache dtype of a ModelOpt checkpoint."""
    inner = table.get("quantization") if isinstance(table.get("quantization"), Mapping) else table
    named = (inner or {}).get("kv_cache_scheme") or (inner or {}).get("kv_cache_quant_algo")
    if isinstance(named, Mapping):
        named = {"8": "fp8", "4": "nvfp4"}.get(str(named.get("num_bits"))) if named.get("type") == "float" else None
    return {"fp8": "fp8", "nvfp4": "nvfp4"}.get(str(named).lower())


def _method(table: Mapping[str, Any]) -> str:
    method = str(table.get("quant_method") or "").lower().replace("_", "-").removeprefix("intel/")
    if not method and ("quant_algo" in table or isinstance(table.get("quantization"), Mapping)):
        return "modelopt"
    if not method and (table.get("load_in_4bit") or table.get("load_in_8bit")):
        return "bitsandbytes"
    return method


def _everything(_: Linear) -> bool:
    return True


def _experts(linear: Linear) -> bool:
    return linear.expert


def _kept(table: Mapping[str, Any], *keys: str) -> Patterns:
    return patterns(item for key in keys for item in table.get(key) or ())


def _modelopt(table: Mapping[str, Any]) -> Quantization | None:
    table = table.get("quantization") or table
    algorithm = str(table.get("quant_algo") or "").upper()
    kept = _kept(table, "exclude_modules", "ignore", "modules_to_not_convert")
    layers = table.get("quantized_layers") or {}
    if algorithm == "MIXED_PRECISION" and not layers:
        return _groups(table, kept)
    if algorithm == "MIXED_PRECISION":
        by_algorithm: dict[str, list[str]] = {}
        for name, chosen in layers.items():
            by_algorithm.setdefault(str(chosen.get("quant_algo") or "").upper(), []).append(name)
        rules = []
        for name, modules in by_algorithm.items():
            if name not in MODELOPT and name not in _NOT_QUANTIZED:
                return None
            rules.append((patterns(modules), MODELOPT.get(name)))
        return Quantization(tuple(rules), kept, beyond=True)
    if algorithm not in MODELOPT:
        return _groups(table, kept) if not algorithm and table.get("config_groups") else None
    return Quantization(((_everything, MODELOPT[algorithm]),), kept, beyond=True)


def _compressed_tensors(table: Mapping[str, Any]) -> Quantization | None:
    sparsity = table.get("sparsity_config") or {}
    if sparsity.get("format", "dense") not in ("dense", None) or "24" in str(table.get("format")):
        return None
    if "config_groups" not in table:
        return None
    return _groups(table, _kept(table, "ignore", "modules_to_not_convert"))


def _groups(table: Mapping[str, Any], kept: Patterns) -> Quantization | None:
    rules: list[tuple[Patterns | Callable[[Linear], bool], Format | None]] = []
    for group in (table.get("config_groups") or {}).values():
        if not group.get("weights"):
            continue
        chosen = _group_format(group["weights"], str(group.get("format") or table.get("format") or ""))
        if chosen is None:
            return None
        targets = group.get("targets") or ["Linear"]
        named = [target for target in targets if target != "Linear" and target not in _EXPERT_CLASSES]
        if named:
            rules.insert(0, (patterns(named), chosen))
        if any(target in _EXPERT_CLASSES for target in targets):
            rules.insert(0, (_experts, chosen))
        if "Linear" in targets:
            rules.append((_everything, chosen))
    return Quantization(tuple(rules), kept, beyond=True)


def _group_format(weights: Mapping[str, Any], name: str) -> Format | None:
    """Of compressed-tensors' description of weights."""
    bits, kind = weights.get("num_bits"), str(weights.get("type") or "int")
    group = int(weights.get("group_size") or 0)
    strategy = str(weights.get("strategy") or ("group" if group > 0 else "tensor"))
    if kind == "float" and bits == 4:
        return MXFP4 if group == 32 or "mxfp4" in name else NVFP4
    if bits not in (2, 3, 4, 8) or kind not in ("int", "float"):
        return None
    if strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        return Format(bits, int(columns), scale_bits=32, outputs=int(rows))
    if kind == "float" and group == 32 and strategy == "group":
        return Format(bits, 32, scale_bits=8)
    shares = None if strategy == "tensor" else max(group, 0)
    zero = 0 if weights.get("symmetric", True) else bits
    order = 32 if str(weights.get("actorder") or "") == "group" else 0
    return Format(bits, shares, zero_bits=zero, input_bits=order)


def _fp8(table: Mapping[str, Any]) -> Quantization | None:
    chosen, block = MODELOPT["FP8"], table.get("weight_block_size")
    if block:
        if not isinstance(block, list) or len(block) != 2:
            return None
        rows, columns = map(int, block)
        chosen = Format(8, columns, scale_bits=32, outputs=rows)
    kept = _kept(table, "modules_to_not_convert", "ignored_layers")
    # Who makes a model makes these: they have the head that drafts, too, which others leave out or as it is.
    return Quantization(((_everything, chosen),), kept, drafts=True)


def _mxfp4(table: Mapping[str, Any]) -> Quantization:
    return Quantization(((_experts, MXFP4),), _kept(table, "modules_to_not_convert"))


def _awq(table: Mapping[str, Any]) -> Quantization:
    bits = _bits(table, "bits", "w_bit")
    group = max(0, int(table.get("group_size", table.get("q_group_size", 128))))
    zero = bits if table.get("zero_point", True) else 0
    return Quantization(((_everything, Format(bits, group, zero_bits=zero)),), _kept(table, "modules_to_not_convert"))


def _gptq(table: Mapping[str, Any]) -> Quantization:
    bits = _bits(table, "bits")
    group = max(0, int(table.get("group_size", 128)))
    chosen = Format(bits, group, zero_bits=bits, input_bits=32)
    rules: list[tuple[Patterns | Callable[[Linear], bool], Format | None]] = []
    for pattern, change in (table.get("dynamic") or {}).items():
        # "-:" leaves modules as they are, "+:" or nothing overrides what the rest has.
        expression = f"re:(.*[.])?{pattern[2:] if pattern[:2] in ('-:', '+:') else pattern}"
        change = change if isinstance(change, Mapping) else {}
        other = int(change.get("bits", bits)), max(0, int(change.get("group_size", group)))
        changed = None if pattern.startswith("-:") else Format(other[0], other[1], zero_bits=other[0], input_bits=32)
        rules.append((patterns([expression]), changed))
    inside = [name for names in table.get("modules_in_block_to_quantize") or () for name in _listed(names)]
    rules.append((patterns(inside), chosen) if inside else (_everything, chosen))
    return Quantization(tuple(rules), _kept(table, "modules_to_not_convert"), beyond=bool(table.get("lm_head")))


def _auto_round(table: Mapping[str, Any]) -> Quantization | None:
    base = _auto_round_format(table, {})
    if base is None:
        return None
    rules: list[tuple[Patterns | Callable[[Linear], bool], Format | None]] = []
    for name, change in (table.get("extra_config") or {}).items():
        if (changed := _auto_round_format(table, change)) is None and int(change.get("bits", 4)) < 16:
            return None
        plain = re.fullmatch(r"[\w.]+", name)
        rules.append((patterns([name if plain else f"re:{name}"]), changed))
    rules.append((_everything, base))
    return Quantization(tuple(rules), _kept(table, "modules_to_not_convert"))


def _auto_round_format(table: Mapping[str, Any], change: Mapping[str, Any]) -> Format | None:
    chosen = {**table, **change}
    bits, group, kind = (
        int(chosen["bits"]),
        max(0, int(chosen.get("group_size", 128))),
        str(chosen.get("data_type", "")),
    )
    if bits >= 16:
        return None
    if kind.startswith("nv_fp"):
        return NVFP4
    if kind.startswith("mx_fp"):
        return Format(bits, 32, scale_bits=8)
    if kind.startswith("fp"):
        return Format(bits, group or 0)
    return Format(bits, group, zero_bits=bits)


def _bitsandbytes(table: Mapping[str, Any]) -> Quantization | None:
    kept = patterns([*(table.get("llm_int8_skip_modules") or ()), "lm_head"])
    if table.get("load_in_4bit") or table.get("_load_in_4bit"):
        # Absolute maxima of 64 numbers, themselves in 8 bits with one float32 for every 256 of them.
        scale = 8 + 32 / 256 if table.get("bnb_4bit_use_double_quant") else 32
        # Rows follow each other without a gap, so that groups are of the matrix, not of a row.
        return Quantization(((_everything, Format(4 + scale / 64, None, 0)),), kept, beyond=True)
    if table.get("load_in_8bit") or table.get("_load_in_8bit"):
        return Quantization(((_everything, Format(8, 0, scale_bits=32)),), kept, beyond=True)
    return None


def _fbgemm(table: Mapping[str, Any]) -> Quantization:
    return Quantization(((_everything, Format(8, 0, scale_bits=32)),), _kept(table, "modules_to_not_convert"))


def _quark(table: Mapping[str, Any]) -> Quantization | None:
    rules: list[tuple[Patterns | Callable[[Linear], bool], Format | None]] = []
    for pattern, change in (table.get("layer_quant_config") or {}).items():
        if (changed := _quark_format(change)) is None:
            return None
        rules.append((patterns([pattern]), changed))
    # Where nothing is said of the rest, it is left as it is.
    if (table.get("global_quant_config") or {}).get("weight"):
        base = _quark_format(table["global_quant_config"])
        if base is None:
            return None
        rules.append((_everything, base))
    return Quantization(tuple(rules), _kept(table, "exclude"), beyond=True) if rules else None


def _quark_format(table: Mapping[str, Any]) -> Format | None:
    weight = table["weight"]
    # Of several one was quantized after the other, and the last is what is stored.
    weight = weight[-1] if isinstance(weight, list) else weight
    kind, group = str(weight["dtype"]), int(weight.get("group_size") or 0)
    if kind in ("fp4", "fp4_e2m1"):
        return MXFP4 if group == 32 else NVFP4
    bits = {"int4": 4, "uint4": 4, "int8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8}.get(kind)
    if bits is None:
        return None
    scheme = str(weight.get("qscheme"))
    return Format(bits, None if scheme == "per_tensor" else group if scheme == "per_group" else 0, scale_bits=32)


def _bits(table: Mapping[str, Any], *keys: str) -> int:
    bits = next((table[key] for key in keys if key in table), None)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError
    return bits


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value] if isinstance(value, list) else []


_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization | None]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm-fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "awq-marlin": _awq,
    "gptq": _gptq,
    "gptq-marlin": _gptq,
    "auto-round": _auto_round,
    "autoround": _auto_round,
    "inc": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "quark": _quark,
}
"""Readers by ``quant_method``; ModelOpt's begins with its name."""
