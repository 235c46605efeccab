"""Where stock vLLM serves an engine, no command gives its figures tidepool's name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tidepool.compare import drive as compare
from tidepool.compare.messages import Job
from tidepool.models import entry
from tidepool.replay.job import Job as ReplayJob
from tidepool.replay.parent import run_jobs
from tidepool.replay.workload import load_workload
from tidepool.verify import drive as verify
from tidepool.verify.scenarios import PREEMPTED, Part
from wrapped_python import run_first

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention alone."""
    from tidepool.testing.tiny import make_checkpoint
    from tidepool.vllm_plugin.compat import platform_plugin

    platform_plugin()
    from transformers import LlamaConfig, LlamaForCausalLM

    path = make_checkpoint("qwen3.5", tmp_path_factory.mktemp("llama") / "model")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def compared(model: Path, folder: Path) -> str:
    with compare.Worker(Job("elastic", str(model), 65_000_000), folder) as worker:
        with pytest.raises(compare.CompareError) as caught:
            worker.start(caching=False, max_num_seqs=8)
        return str(caught.value)


def verified(model: Path, folder: Path) -> str:
    results = verify.run([Part(PREEMPTED, "elastic")], folder, lambda done: None)
    assert not results.outcomes
    return results.errors[0]


def replayed(model: Path, folder: Path) -> str:
    config = entry("Llama-3.1-8B").config
    job = ReplayJob("elastic", config, "H100", 4 << 30, None, "hot-prefix", 3, 0, 1.0, 32, 2048)
    made, failures = run_jobs([job], load_workload(job).requests, Console(file=io.StringIO(), width=120))
    assert not made
    return failures["elastic"]


PATHS = {
    "the model isn't hybrid": ("pass", "layers: the model doesn't keep states beside attention"),
    "the plugin isn't loaded": (
        'os.environ["VLLM_PLUGINS"] = "tidepool_early"',
        "plugin: vLLM didn't load it, for VLLM_PLUGINS=tidepool_early doesn't name tidepool",
    ),
}


@pytest.mark.parametrize("command", [compared, verified, replayed])
@pytest.mark.parametrize(("code", "reason"), PATHS.values(), ids=PATHS)
def test_nothing_that_stock_vllm_served_is_called_tidepool(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    llama: Path,
    command: Callable[[Path, Path], str],
    code: str,
    reason: str,
) -> None:
    model = f"from tidepool.verify import task\ntask.MODEL = {str(llama)!r}"
    run_first(monkeypatch, tmp_path, f"{code}\n{model}")
    said = command(llama, tmp_path)
    assert f"tidepool falls back to vLLM's own KV cache. {reason}" in said
    assert "Error" not in said
