"""Feature by feature: served, served by certificate or left to vLLM. Run as a script it writes docs/supported.md.

What is served names the tests that prove it, by the ids that pytest gives them; test_features.py looks for each. What is
left to vLLM names its gate, and the document has that gate's own sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENT, README = ROOT / "docs" / "supported.md", ROOT / "README.md"
MARK = "<!-- {} of tests/features.py -->"


class Served(NamedTuple):
    """A feature that tidepool serves."""

    name: str
    tests: tuple[str, ...]
    note: str = ""


class LeftToVllm(NamedTuple):
    """A feature that opens a gate, so that the engine is vLLM's."""

    name: str
    gate: str


def _family(case: str) -> str:
    return f"tests/families/test_families.py::test_a_family_answers_as_with_stock_vllm[{case}]"


_OPTIONS = "tests/vllm_plugin/test_options.py::"
_DRAFTS = "tests/speculative/test_speculative.py::"
_CERTIFIED = "tests/serving/test_certified.py::test_a_certificate_opens_what_it_covers_and_nothing_else"
_FP8 = "tests/vllm_plugin/test_gates.py::test_a_certificate_tells_whether_fp8_is_served_on_a_gpu"

SERVED = (
    Served("Qwen3.5", ("tests/serving/test_serving.py::test_tokens_equal_stock_through_preemption[qwen3.5]",)),
    Served("Nemotron-H", ("tests/serving/test_serving.py::test_tokens_equal_stock_through_preemption[nemotron-h]",)),
    Served("Qwen3.5 with images", (_family("qwen3.5-vl"), "tests/families/test_families.py::test_an_image_is_part_of_the_prompt")),
    Served("Qwen3.5 MoE", (_family("qwen3.5-moe"),)),
    Served("Qwen3-Next", (_family("qwen3-next"),)),
    Served("Falcon-H1", (_family("falcon-h1"),)),
    Served("Granite 4 H, dense and MoE", (_family("granite-4-h"), _family("granite-4-h-moe"))),
    Served("Zamba2", (_family("zamba2"),)),
    Served("LFM2, dense and MoE", (_family("lfm2"), _family("lfm2-moe"))),
    Served("windows beside states", (_family("nemotron-h, windows"),)),
    Served("several groups of attention and of states", ("tests/mixed/test_mixed.py::test_four_groups_give_stocks_tokens",)),
    Served("planning and scheduling of latent attention", ("tests/vllm_plugin/test_latent.py::test_what_plan_predicts_is_allocated_to_the_block[elastic]", "tests/vllm_plugin/test_latent.py::test_prompts_hit_and_are_evicted[elastic]"), "engines are left to vLLM: [families.md](families.md#latent-attention-beside-states)"),
    Served("prefix caching", ("tests/serving/test_prefix_hits.py::test_prefix_hits_give_the_same_answers[elastic-qwen3.5]",)),
    Served("prefix_cache_retention_interval", (f"{_OPTIONS}test_the_retention_interval_is_the_users", "tests/serving/test_prefix_hits.py::test_retained_states_give_the_same_answers[nemotron-h-1024]")),
    Served("--mamba-block-size, as the checkpoint spacing", (f"{_OPTIONS}test_the_checkpoint_spacing_is_the_users",)),
    Served("the scheduler's limits and chunked prefill", (f"{_OPTIONS}test_limits_hold",)),
    Served("priority scheduling", ("tests/vllm_plugin/test_priority.py::test_the_urgent_go_first_and_take_the_memory_of_others",)),
    Served("KV events for each group", ("tests/vllm_plugin/test_events.py::test_the_cache_can_be_rebuilt_from_events_alone[Qwen3.5-4B-False]",), "[kv-events.md](kv-events.md)"),
    Served("LoRA", ("tests/adapters/test_adapters.py::test_nobody_hits_what_another_adapter_left",)),
    Served("drafts: n-grams", (f"{_DRAFTS}test_drafts_change_nothing_through_preemption[qwen3.5]", f"{_DRAFTS}test_drafts_beside_prefix_hits[nemotron-h]"), "[speculative.md](speculative.md)"),
    Served("drafts: Qwen3.5's own head (mtp)", (f"{_DRAFTS}test_a_head_that_drafts_after_hits[room for all]",)),
    Served("drafts: EAGLE's heads and small models", (f"{_DRAFTS}test_a_drafter_whose_layer_is_a_group_of_its_own[eagle]", f"{_DRAFTS}test_a_drafter_whose_layer_is_a_group_of_its_own[draft_model]"), "on the CPU"),
    Served("drafts with tensor parallelism", ("tests/parallel/test_drafts.py::test_drafts_on_two_ranks[ngram]", "tests/parallel/test_drafts.py::test_drafts_on_two_ranks[mtp]")),
    Served("tensor parallelism", ("tests/parallel/test_parallel.py::test_tensor_ranks_answer_as_those_of_stock_vllm",), "in one machine, [parallel.md](parallel.md)"),
    Served("pipeline parallelism", ("tests/parallel/test_parallel.py::test_stages_answer_as_one_process_does[stages, prefix caching]",), "in one machine"),
    Served("data parallel engines", ("tests/parallel/test_engines.py::test_each_engine_has_a_cache_of_its_own",), "of models without experts, each with its own arena"),
    Served("host memory behind the pools", ("tests/serving/test_host.py::test_what_was_loaded_gives_the_same_answers[qwen3.5]",), "[host-memory.md](host-memory.md)"),
    Served("packed states (checkpoint_states)", ("tests/serving/test_packed_states.py::test_packed_states_give_the_same_answers[qwen3.5-int8]", "tests/serving/test_packed_states.py::test_packed_states_give_the_same_answers[nemotron-h-int8]"), "lossy, off by default; [packed-states.md](packed-states.md)"),
    Served("packed keys and values (kv) on the CPU", ("tests/tqkv/test_tqkv_engine.py::test_answers_are_right",), "[tqkv.md](tqkv.md)"),
    Served("the fixed partition", ("tests/serving/test_prefix_hits.py::test_prefix_hits_give_the_same_answers[fixed-qwen3.5]",)),
)  # fmt: skip
"""On the CPU without anything else; on a GPU with a certificate for the engine."""

BY_CERTIFICATE = (
    Served("a GPU, either of vLLM's model runners", (_CERTIFIED, "tests/test_certificates.py::test_what_a_certificate_covers_is_served")),
    Served("fp8 keys and values", (f"{_FP8}[cuda-fp8-True]", f"{_FP8}[cpu-fp8-False]"), "on a GPU; nobody has run that yet"),
    Served("TurboQuant's keys and values", ("tests/vllm_plugin/test_gates.py::test_turboquant_is_for_gpus",), "on a GPU; nobody has run that yet"),
    Served("drafts on a GPU", ("tests/vllm_plugin/test_gates.py::test_drafters_that_were_run_are_served",), "by a certificate for these drafts and ranks"),
)  # fmt: skip
"""`tidepool verify` makes one on the machine where it is to hold."""

LEFT_TO_VLLM = (
    LeftToVllm("KV connectors", "kv-connector"),
    LeftToVllm("encoder cache connectors", "ec-connector"),
    LeftToVllm("offloading without prefix caching, and of other backends", "kv-offload"),
    LeftToVllm("data parallel ranks of mixtures of experts", "data-parallel"),
    LeftToVllm("decode context parallelism", "decode-context-parallel"),
    LeftToVllm("prefill context parallelism", "prefill-context-parallel"),
    LeftToVllm("Ray, several nodes", "executor"),
    LeftToVllm("other drafters", "speculative-decoding"),
    LeftToVllm("drafts over pipeline stages", "speculative-stages"),
    LeftToVllm("latent attention", "mla"),
    LeftToVllm("other KV cache dtypes", "kv-cache-dtype"),
    LeftToVllm("ReplaySSM", "replayssm"),
    LeftToVllm("prefix_match_unit", "prefix-match-unit"),
    LeftToVllm("HiSparse", "hisparse"),
    LeftToVllm("disable_hybrid_kv_cache_manager", "hybrid-manager-off"),
    LeftToVllm("scheduler_cls", "scheduler-class"),
    LeftToVllm("watermark", "watermark"),
    LeftToVllm("kv_cache_metrics", "kv-cache-metrics"),
    LeftToVllm("encoder-decoder models", "encoder-decoder"),
    LeftToVllm("vLLM's second model runner on the CPU", "model-runner-v2"),
    LeftToVllm("auxiliary outputs", "aux-output"),
    LeftToVllm("models that group their layers", "kv-cache-grouping"),
    LeftToVllm("hashes that look far ahead", "hash-lookahead"),
    LeftToVllm("an additional_config of another type", "additional-config"),
)  # fmt: skip


def document() -> str:
    """docs/supported.md."""
    from tidepool.vllm_plugin.gates import GATES

    reasons = {gate.name: gate.reason for gate in GATES}
    left = [(row.name, f"`{row.gate}`", reasons[row.gate]) for row in LEFT_TO_VLLM]
    return "\n".join(
        [
            "# What is served",
            "",
            "Written by `PYTHONPATH=tests python tests/features.py` from that file's tables. A test looks for every test "
            "named here, and wants a row for every gate.",
            "",
            "## Served",
            "",
            "On the CPU; on a GPU where a [certificate](verify.md#certificates) covers the engine, which none does yet whose "
            "states are others than Gated DeltaNet's and Mamba2's.",
            "",
            *_table(("feature", "", "test"), _proven(SERVED)),
            "",
            "## Served by certificate alone",
            "",
            *_table(("feature", "", "test of the rule"), _proven(BY_CERTIFICATE)),
            "",
            "## Left to vLLM",
            "",
            "The engine uses vLLM's own KV cache, and the log says `gate: reason`. Layers have gates too, which are "
            "looked at once the model is loaded: `unsupported_layers` in "
            "[gates.py](../src/tidepool/vllm_plugin/gates.py).",
            "",
            *_table(("feature", "gate", "reason"), left),
            "",
        ]
    )


def with_summary(readme: str) -> str:
    """README.md with the names of all features."""
    rows = [
        (how, "; ".join(row.name for row in table))
        for how, table in (("served", SERVED), ("by certificate", BY_CERTIFICATE), ("left to vLLM", LEFT_TO_VLLM))
    ]
    begin, end = MARK.format("begin features"), MARK.format("end features")
    before, opened, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    assert opened, "README.md has no place for the features"
    assert closed, "README.md has no place for the features"
    return "\n".join([f"{before}{begin}", "", *_table(("", "features"), rows), "", f"{end}{after}"])


def _proven(rows: Iterable[Served]) -> list[tuple[str, str, str]]:
    return [(row.name, row.note, ", ".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)) for row in rows]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    README.write_text(with_summary(README.read_text(encoding="utf-8")), encoding="utf-8")
