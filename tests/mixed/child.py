"""tests/serving/child.py with a model whose attention layers differ."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

from mixed_model import differ

differ()
runpy.run_path(str(Path(__file__).parents[1] / "serving" / "child.py"))
