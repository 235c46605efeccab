"""What packing cached states costs in answers: the trained model, asked behind hits, for each format.

Conversations of twenty turns go through real vLLM; every turn goes on from the state that the turn before left, packed
anew each time. And stories of all lengths are asked about twice, the second time behind a hit. For each format: right
answers, how far a state is from the one that was packed, and how far log-probabilities are from those of ``same``.

    python bench/packed_quality.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from multiprocessing import get_context
from statistics import mean
from typing import Any

LENGTHS = (100, 200, 400, 800, 1_600, 3_000)
TURNS = 20
CONVERSATIONS = 12
QUESTIONS = 6
"""About each of four stories of a length."""
FORMATS = ("same", "bfloat16", "int8")


def main() -> None:
    """Run every format in a process of its own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write all numbers to this file")
    options = parser.parse_args()
    found = {}
    for state_format in FORMATS:
        with get_context("spawn").Pool(1) as pool:
            found[state_format] = pool.apply(measure, (state_format,))
    rows = {state_format: compare(found["same"], each) for state_format, each in found.items()}
    print(f"{'':10}{'right':>12}{'by turn 20':>12}{'hit':>8}{'state error':>13}{'worst':>8}{'logprob':>10}{'worst':>8}")
    for state_format, row in rows.items():
        print(
            f"{state_format:10}{row['right']:>6}/{row['answers']:<5}{row['last_turn_right']:>8.1%}{row['hit_rate']:>10.1%}"
            f"{row['state_error']:>11.2%}{row['state_error_worst']:>9.2%}{row['logprob_difference']:>10.4f}"
            f"{row['logprob_worst']:>8.3f}"
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


def measure(state_format: str) -> dict[str, Any]:
    """Ask everything with cached states of this format."""
    os.environ |= {"TIDEPOOL": "elastic", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    from tidepool.verify.task import ANSWER_TOKENS, MODEL, make_conversation, make_prompts

    errors = note_errors()
    llm = LLM(
        model=str(MODEL),
        max_model_len=4_096,
        max_num_seqs=16,
        kv_cache_memory_bytes=400_000_000,
        enable_prefix_caching=True,
        enforce_eager=True,
        seed=0,
        additional_config={"tidepool": {"checkpoint_states": state_format}},
    )
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, logprobs=5)
    result: dict[str, Any] = {"right": [], "last_turn": [], "logprobs": [], "hit": 0, "tokens": 0}

    def ask(prompts: Sequence[Any]) -> list[bool]:
        outputs = llm.generate([{"prompt_token_ids": p.tokens} for p in prompts], sampling, use_tqdm=False)
        right = []
        for prompt, output in zip(prompts, outputs, strict=True):
            made = output.outputs[0]
            right.append(prompt.question.is_right(list(made.token_ids)))
            result["logprobs"].append({str(token): each.logprob for token, each in made.logprobs[0].items()})
            result["hit"] += output.num_cached_tokens or 0
            result["tokens"] += len(prompt.tokens)
        result["right"] += right
        return right

    conversations = [make_conversation(900 + n, length=3_000, turns=TURNS) for n in range(CONVERSATIONS)]
    for number, turn in enumerate(zip(*conversations, strict=True)):
        right = ask(turn)
        if number == TURNS - 1:
            result["last_turn"] = right
    for length in LENGTHS:
        prompts = make_prompts(1_000 + length, length=length, stories=4, questions=QUESTIONS)
        ask(prompts)
        ask(prompts)
    return result | {"errors": errors}


def note_errors() -> list[float]:
    """Relative errors of the matrices of the states that are packed from now on; filled as the engine runs."""
    import torch

    from tidepool.vllm_plugin.state_parts import StatePacker

    errors: list[float] = []
    pack = StatePacker.pack

    def noted(self: StatePacker, state: Any, packed: Any) -> None:
        pack(self, state, packed)
        again = torch.empty_like(state)
        self.unpack(packed, again)
        before, after = (self._state(each)[0].float() for each in (state, again))
        errors.append(float((after - before).norm() / before.norm()))

    StatePacker.pack = noted  # type: ignore[method-assign]
    return errors


def compare(same: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A format beside ``same``: differences of the log-probabilities of the five likeliest first tokens.

    The model is sure of its answers, so it is the others among them that differ.
    """
    differences = []
    for before, after in zip(same["logprobs"], other["logprobs"], strict=True):
        differences += [abs(before[token] - after[token]) for token in before.keys() & after.keys()]
    errors = other["errors"] or [0.0]
    return {
        "answers": len(other["right"]),
        "right": sum(other["right"]),
        "last_turn_right": mean(other["last_turn"]),
        "hit_rate": other["hit"] / other["tokens"],
        "states_packed": len(other["errors"]),
        "state_error": mean(errors),
        "state_error_worst": max(errors),
        "logprob_difference": mean(differences),
        "logprob_worst": max(differences),
    }


if __name__ == "__main__":
    main()
