"""LoRA adapters beside prefix caching: nobody hits what another adapter has left, whatever name and place it has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from answers import gaps, tokens
from engines import run_child
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
RANK = 8


def make_adapter(path: Path, model: Path, *, seed: int) -> Path:
    """An adapter of random weights, strong enough to change answers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    weights = {}
    for layer in (0, 3):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) / inner**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden, RANK, generator=generator)
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["down_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(described))
    return path


def phase(adapter: Path | None = None, place: str = "", identity: int = 1, reload: str | None = None) -> dict[str, Any]:
    return {"adapter": adapter and str(adapter), "place": place, "id": identity, "reload": reload}


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What stock answers without prefix caching, and tidepool with it, phase by phase."""
    root = tmp_path_factory.mktemp("adapters")
    model = make_checkpoint("qwen3.5", root / "model")
    a, b, c, d = (make_adapter(root / name, model, seed=seed) for seed, name in enumerate("abcd"))
    rng = random.Random(4)
    job = {
        "model": str(model),
        "served": str(root / "served"),
        "prompts": [[rng.randrange(5, 500) for _ in range(length)] for length in (700, 90)],
        "engines": [{"side": "off", "caching": False}, {"side": "elastic", "caching": True}],
        "phases": [
            phase(),
            phase(a, "one"),
            phase(b, "other", 2),
            phase(),
            phase(a, "one"),
            phase(c, "one", reload="request"),
            phase(c, "one"),
            phase(d, "one", reload="engine"),
            phase(d, "one"),
        ],
    }
    return run_child(Path(__file__).with_name("adapters_child.py"), job, timeout=600)  # type: ignore[no-any-return]


def test_adapters_change_answers(phases: list[list[dict[str, Any]]]) -> None:
    reference = [tokens(phase) for phase in phases[0]]
    assert reference[3] == reference[0]
    assert reference[4] == reference[1]
    assert reference[6] == reference[5]
    assert reference[8] == reference[7]
    each = [str(reference[number]) for number in (0, 1, 2, 5, 7)]
    assert len(set(each)) == len(each), "adapters that do nothing prove nothing"


def test_nobody_hits_what_another_adapter_left(phases: list[list[dict[str, Any]]]) -> None:
    reference, served = phases
    found = [gap for pair in zip(reference, served, strict=True) for gap in gaps(*pair)]
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    hits = [sum(phase["cached"]) > 0 for phase in served]
    # The first prompt is long enough to leave a state at once. Hits where an adapter, or none, comes again as it was:
    # not where it is another of the same name and place.
    assert hits == [False, False, False, True, True, False, True, False, True]


def test_an_adapter_has_a_number_once_it_is_another_one(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from tidepool.vllm_plugin.adapters import AdapterNumbers

    files, elsewhere = tmp_path / "adapter", LoRARequest("far", 2, "hub/adapter")
    files.mkdir()
    (files / "adapter_model.safetensors").write_bytes(b"old")
    adapter = LoRARequest("near", 1, str(files))
    numbers = AdapterNumbers()
    numbers.loaded(adapter)
    assert [numbers.of(each) for each in (adapter, adapter, elsewhere)] == [0, 0, 0], "as vLLM hashes it"
    (files / "adapter_model.safetensors").write_bytes(b"other")
    assert [numbers.of(each) for each in (adapter, adapter, elsewhere)] == [1, 1, 0]
    for each in (adapter, elsewhere):
        numbers.loaded(each)
    assert [numbers.of(each) for each in (adapter, adapter, elsewhere)] == [2, 2, 1]


def test_who_waits_looks_for_what_the_new_adapter_left() -> None:
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    from tidepool.vllm_plugin import compat

    assert compat.patch_adapter_hashes()
    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)

    def request(name: str, adapter: LoRARequest | None) -> Request:
        return Request(
            name, list(range(64)), SamplingParams(max_tokens=4), None, lora_request=adapter, block_hasher=hasher
        )

    adapter = LoRARequest("waited-for", 1, "hub/waited-for")
    requests = {
        "plain": request("plain", None),
        "running": request("running", adapter),
        "waiting": request("waiting", adapter),
    }
    requests["running"].num_computed_tokens = 32
    before = {name: list(each.block_hashes) for name, each in requests.items()}
    assert before["running"] == before["waiting"] != before["plain"]
    core = SimpleNamespace(
        scheduler=SimpleNamespace(requests=requests), model_executor=SimpleNamespace(add_lora=lambda adapter: True)
    )
    assert EngineCore.add_lora(core, adapter)
    after = {name: list(each.block_hashes) for name, each in requests.items()}
    assert after["plain"] == before["plain"]
    assert after["running"] == before["running"]
    assert not set(after["waiting"]) & set(before["waiting"])
    assert after["waiting"] == request("new", adapter).block_hashes
