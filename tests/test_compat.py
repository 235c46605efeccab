import functools
import json
import os
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
compat = pytest.importorskip("tidepool.vllm_plugin.compat")

# Which vLLM and platform ------------------------------------------------------------------------------------


def pretend_vllm(monkeypatch: pytest.MonkeyPatch, version: str, *, cpu: bool) -> None:
    version_module = types.ModuleType("vllm.version")
    version_module.__version__ = version  # type: ignore[attr-defined]
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: cpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.version", version_module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


def vllms_scan(
    x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: Any, out: Any, D: Any = None, z: Any = None,
    dt_bias: Any = None, initial_states: Any = None, return_intermediate_states: Any = False, seq_idx: Any = None,
    cu_seqlens: Any = None, cu_chunk_seqlens: Any = None, last_chunk_indices: Any = None, dt_softplus: Any = False,
    dt_limit: Any = None, state_dtype: Any = None, **kwargs: Any,
) -> str:  # fmt: skip
    return "vLLM's own"


def vllms_store(
    checkpoint: Any, chunk_idx: Any, x: Any, conv_state: Any, chunk_states: Any, ssm_state: Any, query_start_loc: Any,
    *, state_len: int,
) -> str:  # fmt: skip
    return "vLLM's own"


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> tuple[types.ModuleType, types.ModuleType]:
    """Stand-ins for the two vLLM modules that are patched."""
    package = "vllm.model_executor.layers.mamba.ops"
    parent, combined, checkpoint = (types.ModuleType(package + end) for end in ("", ".ssd_combined", ".ssd_checkpoint"))
    combined._mamba_chunk_scan_combined_fwd = vllms_scan  # type: ignore[attr-defined]
    checkpoint.store_prefill_checkpoint = vllms_store  # type: ignore[attr-defined]
    parent.ssd_combined, parent.ssd_checkpoint = combined, checkpoint  # type: ignore[attr-defined]
    for module in (parent, combined, checkpoint):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "vllm.model_executor.layers.mamba.mamba_mixer2", raising=False)
    return combined, checkpoint


@pytest.mark.parametrize(("version", "cpu"), [("0.31.1", True), ("0.34.0", True), ("1.32.0", True), ("0.32.0", False)])
def test_other_versions_and_platforms_are_left_alone(
    version: str, cpu: bool, ops: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_vllm(monkeypatch, version, cpu=cpu)
    assert not compat.patch_mamba2_cpu_checkpoints()
    assert ops[0]._mamba_chunk_scan_combined_fwd is vllms_scan


def test_mamba2_patch_is_applied_once(ops: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_vllm(monkeypatch, "0.32.0", cpu=True)
    mixer = types.ModuleType("vllm.model_executor.layers.mamba.mamba_mixer2")
    monkeypatch.setitem(sys.modules, mixer.__name__, mixer)
    assert compat.patch_mamba2_cpu_checkpoints()
    combined, checkpoint = ops
    scan, store = combined._mamba_chunk_scan_combined_fwd, checkpoint.store_prefill_checkpoint
    assert scan.__wrapped__ is vllms_scan
    assert scan(*[None] * 7, cu_chunk_seqlens=None) == "vLLM's own", "nobody has asked for states"
    assert store.__wrapped__ is vllms_store
    assert mixer.store_prefill_checkpoint is store
    assert compat.patch_mamba2_cpu_checkpoints()
    assert combined._mamba_chunk_scan_combined_fwd is scan
    assert checkpoint.store_prefill_checkpoint is store


# Wheels that do not fit -------------------------------------------------------------------------------------

LIBRARIES = {
    "torchvision": "_C.so",
    "torchaudio": "lib/_torchaudio.abi3.so",
    "torchcodec": "libtorchcodec_image.so",
}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three packages with compiled libraries that do not load, beside a CPU torch."""
    for package, library in LIBRARIES.items():
        file = tmp_path / package / library
        file.parent.mkdir(parents=True)
        file.write_text("not a library")
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compat, "_held", [])
    monkeypatch.setattr(compat, "_hidden", set())
    monkeypatch.setattr(torch.version, "cuda", None)
    return tmp_path


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operator schemas declared, in place of declaring them."""
    schemas: list[str] = []
    monkeypatch.setattr(torch.library, "Library", lambda *_: types.SimpleNamespace(define=schemas.append))
    return schemas


def test_broken_wheels_are_worked_around(wheels: Path, declared: list[str]) -> None:
    assert compat.declare_torchvision_ops()
    assert compat.declare_torchvision_ops()
    assert [schema.split("(")[0] for schema in declared] == ["nms", "qnms"]
    assert compat.hide_media_packages()
    assert compat.hide_media_packages()
    for package in ("torchaudio", "torchcodec"):
        with pytest.raises(ModuleNotFoundError):
            __import__(package)


@pytest.mark.parametrize("change", ["cuda torch", "libraries load", "not installed"])
def test_healthy_installations_are_left_alone(
    change: str, wheels: Path, declared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "cuda torch":
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    elif change == "libraries load":
        monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not compat.declare_torchvision_ops()
    assert not compat.hide_media_packages()
    assert declared == []
    assert not set(LIBRARIES) & set(sys.modules)


# Mamba2 states ----------------------------------------------------------------------------------------------


def plain_scan(
    x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, out: Any, *, cu_seqlens: Any, **options: Any
) -> Any:
    """A scan by its definition, one state per sequence, blind to ``return_intermediate_states``."""
    bounds = cu_seqlens.tolist()
    states = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        initial = options.get("initial_states")
        state = torch.zeros(x.shape[1], x.shape[2], B.shape[2]) if initial is None else initial[index].float()
        for t in range(start, end):
            decay = torch.exp(dt[t] * A)[:, None, None]
            state = decay * state + dt[t][:, None, None] * x[t][:, :, None] * B[t, 0]
            out[t] = state @ C[t, 0]
        states.append(state)
    return torch.stack(states).to(options.get("state_dtype") or x.dtype)


@pytest.mark.parametrize("with_initial_states", [False, True])
def test_chunk_states_are_the_states_of_shorter_sequences(with_initial_states: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, head_dim, state_dim = 23, 2, 3, 4
    x = torch.randn(tokens, heads, head_dim, generator=generator)
    dt = torch.rand(tokens, heads, generator=generator)
    A = -torch.rand(heads, generator=generator)
    B, C = torch.randn(2, tokens, 1, state_dim, generator=generator)
    initial = torch.randn(3, heads, head_dim, state_dim, generator=generator) if with_initial_states else None
    ends = [0, 5, 8, 16, 20, 23]  # chunk bounds of sequences 0-8, 8-16 and 16-23
    options: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 8, 16, 23]),
        "cu_chunk_seqlens": torch.tensor(ends),
        "seq_idx": torch.tensor([0, 0, 1, 2, 2]),
        "initial_states": initial,
    }
    scan = functools.partial(compat.scan_with_chunk_states, plain_scan)

    expected_out, out = torch.empty_like(x), torch.empty_like(x)
    final = plain_scan(x, dt, A, B, C, 8, expected_out, **options)
    states = scan(x, dt, A, B, C, 8, out, return_intermediate_states=True, **options)
    assert states.shape[0] == 5
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(states[[1, 2, 4]], final)
    options["cu_seqlens"] = torch.tensor([0, 5])
    torch.testing.assert_close(states[:1], plain_scan(x, dt, A, B, C, 8, out, **options))

    del options["cu_chunk_seqlens"]  # unasked, the scan is passed through
    torch.testing.assert_close(scan(x, dt, A, B, C, 8, out, **options), states[:1])


def test_checkpoint_goes_to_its_block_and_nowhere_else() -> None:
    x = torch.arange(2 * 12.0).reshape(2, 12)
    conv, ssm = torch.zeros(4, 2, 5), torch.zeros(4, 1, 2, 2)
    chunk_states = torch.arange(3 * 4.0).reshape(3, 1, 2, 2)
    checkpoint = types.SimpleNamespace(checkpoint_offsets=torch.tensor([0, 4]), state_indices=torch.tensor([1, 3]))
    compat.store_prefill_checkpoint(
        vllms_store,
        checkpoint,
        torch.tensor([0, 2]),
        x,
        conv,
        chunk_states,
        ssm,
        torch.tensor([0, 6, 12]),
        state_len=3,
    )
    assert torch.equal(conv[3, :, :3], x[:, 7:10])
    assert torch.equal(ssm[3], chunk_states[2])
    assert not conv[:3].any()
    assert not conv[3, :, 3:].any()
    assert not ssm[:3].any()


# The real engine --------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=2048, max_num_seqs=4, num_gpu_blocks_override=64, enforce_eager=True)
prompt = {"prompt_token_ids": [5 + (i * i + 3 * i) % 500 for i in range(1500)]}
params = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
runs = []
for _ in range(2):
    result = llm.generate(prompt, params, use_tqdm=False)[0]
    best = [next(iter(step.values())).logprob for step in result.outputs[0].logprobs]
    runs.append([result.num_cached_tokens, list(result.outputs[0].token_ids), best])
print("RESULT" + json.dumps(runs))
"""


@pytest.fixture
def compat_only(tmp_path: Path) -> dict[str, str]:
    """Environment of stock vLLM with these work-arounds and no other plugin, kept light."""
    plugin = tmp_path / "plugin" / "tidepool_compat-0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: tidepool-compat\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ntidepool_compat = tidepool.vllm_plugin.compat:platform_plugin\n"
        "[vllm.general_plugins]\ntidepool_compat = tidepool.vllm_plugin.compat:apply_compat\n"
    )
    return os.environ | {
        "PYTHONPATH": str(plugin.parent),
        "VLLM_PLUGINS": "tidepool_compat",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One unpinned thread: pinned ones wait for each other when the machine is busy.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_a_prefix_hit_continues_like_the_first_run(family: str, tmp_path: Path, compat_only: dict[str, str]) -> None:
    pytest.importorskip("vllm.version", exc_type=ImportError)
    checkpoint = pytest.importorskip("tidepool.testing.tiny").make_checkpoint(family, tmp_path / "model")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)],
        env=compat_only,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "RESULT" in process.stdout, process.stderr[-3000:]
    (cold, tokens, best), (hit, tokens_after_hit, best_after_hit) = json.loads(
        process.stdout.split("RESULT")[1].splitlines()[0]
    )
    assert cold == 0
    assert hit > 0
    # The hit cuts the prompt elsewhere, so bfloat16 may tip a near-tie; before that nothing may differ.
    differs = (i for i, (a, b) in enumerate(zip(tokens, tokens_after_hit, strict=True)) if a != b)
    same = next(differs, len(tokens))
    assert same >= 4
    assert best_after_hit[:same] == pytest.approx(best[:same], abs=0.2)
