"""How well answers survive the formats of tqkv: `python bench/tqkv_quality.py [--json FILE]`.

The trained model that tidepool ships answers questions about texts of several lengths through real vLLM on the CPU,
once for each format. Facts are found again by attention, so their answers need the cache that is compressed; registers live
in the states, which are not.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

KIND_WORDS = {"fact": "facts", "register": "registers"}
LENGTHS = (500, 2_000, 4_000)
STORIES, QUESTIONS = 12, 5
FORMATS = ("auto", "tqkv-k8v8", "tqkv-k4v4", "tqkv-k3v3", "tqkv-k2v2", "tqkv-k8v2", "tqkv-k2v8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help=f"by default {' '.join(FORMATS)}")
    parser.add_argument("--stories", type=int, default=STORIES, help="texts of each length")
    arguments = parser.parse_args()
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    os.environ |= defaults | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | os.environ
    rows = measure(arguments.formats, arguments.stories)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def measure(formats: list[str], stories: int) -> list[dict[str, Any]]:
    """Right answers for each format, length and kind of question."""
    from vllm import LLM, SamplingParams

    from tidepool.verify.task import ANSWER_TOKENS, MAX_TOKENS, MODEL, make_prompts

    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    rows, engines = [], []  # An engine that is collected takes vLLM's process-wide state with it.
    for name in formats:
        llm = LLM(
            str(MODEL),
            seed=0,
            kv_cache_memory_bytes=100_000_000,
            max_model_len=MAX_TOKENS,
            max_num_seqs=16,
            max_num_batched_tokens=4 * MAX_TOKENS,
            enforce_eager=True,
            enable_prefix_caching=False,
            additional_config={} if name == "auto" else {"tidepool": {"kv": name}},
        )
        engines.append(llm)
        config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        group = min(config.kv_cache_groups, key=lambda group: group.kv_cache_spec.page_size_bytes)
        row: dict[str, Any] = {
            "format": name,
            "bytes_per_token": len(group.layer_names)
            * group.kv_cache_spec.page_size_bytes
            // group.kv_cache_spec.block_size,
            "answers": {},
        }
        for length in LENGTHS:
            for kind in KIND_WORDS:
                prompts = make_prompts(length, length=length, stories=stories, questions=QUESTIONS, kind=kind)
                outputs = llm.generate([{"prompt_token_ids": p.tokens} for p in prompts], sampling, use_tqdm=False)
                pairs = zip(prompts, outputs, strict=True)
                right = sum(prompt.question.is_right(output.outputs[0].token_ids) for prompt, output in pairs)
                row["answers"][f"{kind} {length}"] = {"right": right, "of": len(prompts)}
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Right answers, in percent and as they are in JSON."""
    columns = [(kind, length) for kind in KIND_WORDS for length in LENGTHS]
    heads = ["format", "B a token", *(f"{KIND_WORDS[kind]} {length:,}" for kind, length in columns)]
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for row in rows:
        answers = [row["answers"][f"{kind} {length}"] for kind, length in columns]
        cells = [
            row["format"],
            f"{row['bytes_per_token']:,}",
            *(f"{each['right'] / each['of']:.0%}" for each in answers),
        ]
        print("| " + " | ".join(cells) + " |")
    of = {f"{answer['of']}" for row in rows for answer in row["answers"].values()}
    print(f"\nExactly right answers, of {' or '.join(sorted(of))} in each cell; lengths of texts in tokens.")


if __name__ == "__main__":
    main()
