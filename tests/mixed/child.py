"""tests/engine_child.py with a model whose attention layers differ."""

from __future__ import annotations

import os

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from mixed_model import differ

from engine_child import main

differ()
main()
