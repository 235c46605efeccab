"""Model shapes: from an HF configuration to what every layer keeps in the cache, and its weights.

Importing this needs neither torch nor vLLM nor transformers.
"""

from tidepool.models.catalogue import Entry, entry, find_model, names
from tidepool.models.config import ModelConfigError, read_config
from tidepool.models.dtypes import COMPARED_KV_DTYPES, KV_DTYPES, STATE_DTYPES
from tidepool.models.families import FAMILIES, model_from_config
from tidepool.models.mixers import WINDOWS, CacheOptions
from tidepool.models.model import Layer, Model

__all__ = [
    "COMPARED_KV_DTYPES",
    "FAMILIES",
    "KV_DTYPES",
    "STATE_DTYPES",
    "WINDOWS",
    "CacheOptions",
    "Entry",
    "Layer",
    "Model",
    "ModelConfigError",
    "entry",
    "find_model",
    "model_from_config",
    "names",
    "read_config",
]
