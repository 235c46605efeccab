"""How well answers survive the formats of tqkv: `python bench/tqkv_quality.py [--json FILE]`.

The trained model that tidepool ships answers questions about texts through real vLLM on the CPU, once for each format.
Facts are found again by attention, so their answers need the cache that is compressed; registers live in the states,
which are not. Where all answers are right, the model's doubt still tells formats apart: minus the log-probability of a
right answer, on average. Beside that stands what attention gets wrong with random keys, values and queries: the error
of an output over its length (root mean squares), by theory and measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tidepool.verify.task import ANSWER_TOKENS, MAX_TOKENS, MODEL, Kind, make_prompts

LENGTHS = (1_000, 4_000)
QUESTIONS = 5
"""About each text, of each kind."""
FORMATS = ("auto", "tqkv-k8v8", "tqkv-k4v4", "tqkv-k3v3", "tqkv-k2v2", "tqkv-k8v2", "tqkv-k2v8")


@dataclass(frozen=True)
class Score:
    """Questions of one kind, all lengths."""

    right: int
    of: int
    doubt: float


@dataclass(frozen=True)
class Row:
    """One format."""

    format: str
    token_bytes: int
    """Of all attention layers."""
    scores: dict[Kind, Score]
    error: tuple[float, float]
    """Of attention, by theory and measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help=f"by default {' '.join(FORMATS)}")
    parser.add_argument("--stories", type=int, default=6, help="texts of each length")
    arguments = parser.parse_args()
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    os.environ |= defaults | dict(os.environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    rows = measure(arguments.formats, arguments.stories)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def measure(formats: Sequence[str], stories: int) -> list[Row]:
    """Ask every question with every format."""
    from vllm import LLM

    from tidepool.vllm_plugin.served import require_plugin

    engines, rows = [], []  # An engine that is collected takes vLLM's process-wide state with it.
    for name in formats:
        engines.append(
            LLM(
                str(MODEL),
                seed=0,
                kv_cache_memory_bytes=100_000_000,
                max_model_len=MAX_TOKENS,
                max_num_seqs=16,
                max_num_batched_tokens=MAX_TOKENS,
                enforce_eager=True,
                enable_prefix_caching=True,
                additional_config={} if name == "auto" else {"tidepool": {"kv": name}},
            )
        )
        require_plugin()  # Without it the format would be bfloat16, whatever its name.
        scores = {kind: ask(engines[-1], kind, stories) for kind in KINDS}
        rows.append(Row(name, token_bytes(engines[-1]), scores, attention_error(name)))
    return rows


KINDS: tuple[Kind, ...] = ("fact", "register")


def ask(llm: Any, kind: Kind, stories: int) -> Score:
    """The score of one kind of question."""
    from vllm import SamplingParams

    prompts = [
        prompt
        for length in LENGTHS
        for prompt in make_prompts(length, length=length, stories=stories, questions=QUESTIONS, kind=kind)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt.tokens} for prompt in prompts], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    right = [a for p, a in zip(prompts, answers, strict=True) if p.question.is_right(a.token_ids)]
    return Score(len(right), len(prompts), -sum(answer.cumulative_logprob for answer in right) / max(len(right), 1))


def token_bytes(llm: Any) -> int:
    """Bytes that all attention layers keep for a token, from the running engine."""
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    (attention,) = (group for group in groups if "Attention" in type(group.kv_cache_spec).__name__)
    spec = attention.kv_cache_spec
    return int(len(attention.layer_names) * spec.page_size_bytes // spec.block_size)


def attention_error(name: str, tokens: int = 2_000, asked: int = 512, size: int = 128) -> tuple[float, float]:
    """With normally distributed keys, values and queries."""
    import torch

    from tidepool.tqkv.attention import attend, write
    from tidepool.tqkv.codec import HeadCodec
    from tidepool.tqkv.error import expected_error
    from tidepool.tqkv.formats import FORMATS

    if name not in FORMATS:
        return 0.0, 0.0
    random = torch.Generator().manual_seed(0)
    key, value, query = torch.randn(3, tokens, 1, size, generator=random)
    codec, query = HeadCodec(FORMATS[name], size), query[:asked]
    pages = torch.zeros(1, 1, tokens, codec.bytes, dtype=torch.uint8)
    write(pages, torch.arange(tokens), key, value, codec)
    output, squares = expected_error(query[:, 0], key[:, 0], value[:, 0], size**-0.5, FORMATS[name])
    found = attend(query, pages, torch.tensor([0]), tokens, size**-0.5, codec)[:, 0] - output
    length = output.square().sum(-1).mean()
    return float((squares.mean() / length).sqrt()), float((found.square().sum(-1).mean() / length).sqrt())


def print_table(rows: Sequence[Row]) -> None:
    """In Markdown."""
    heads = ["format", "bytes a token", "facts right", "doubt", "registers right", "doubt", "error, theory", "measured"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        cells = [row.format, f"{row.token_bytes:,}"]
        for score in row.scores.values():
            cells += [f"{score.right}/{score.of}", f"{score.doubt:.1e}"]
        cells += [f"{error:.2%}" for error in row.error]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
