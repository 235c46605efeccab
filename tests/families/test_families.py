"""Every family of `tidepool.testing.tiny` through real vLLM: what is cached, evicted and found gives stock's answers.

The reference is stock vLLM with memory for all and prefix caching off. In float32 answers may part only where both
tokens are as good as equal; in bfloat16, which Gated DeltaNet's kernels ask for, see `BFLOAT16_GAP`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, Case, checkpoint_of

from answers import gaps, tokens
from engines import run_child
from tidepool.running.agreement import BFLOAT16_GAP

pytestmark = [pytest.mark.vllm, pytest.mark.heavy]
FLOAT32_GAP = 0.01
"""Log-probabilities that rounding accounts for in float32."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("families")
    jobs = [case.job() | {"model": str(checkpoint_of(case, root))} for case in CASES]
    got = run_child(Path(__file__).with_name("child.py"), {"cases": jobs}, timeout=1800)
    return {case.name: result for case, result in zip(CASES, got, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_answers_as_with_stock_vllm(results: dict[str, dict[str, Any]], case: Case) -> None:
    result = results[case.name]
    assert "error" not in result, result["error"]
    stock, served = result["stock"], result["elastic"]
    assert served["served"]
    assert not stock["served"]
    assert served["in_use_at_end"] == 0, "blocks leaked"
    asked = len(stock["answers"]) // case.rounds
    # Two prompts of a family may begin their answers alike.
    assert len({tuple(answer) for answer in tokens(stock)}) >= asked - 1, (
        "outputs that don't discriminate prove nothing"
    )
    for side in (stock, served):
        numbers = (number for each in side["answers"] for step in each["logprobs"] for number in step.values())
        assert not any(math.isnan(number) for number in numbers)
    found = gaps(stock, served)
    assert all(gap <= (FLOAT32_GAP if "dtype" in case.engine else BFLOAT16_GAP) for gap in found), found
    assert sum(stock["cached"]) == 0
    first, again = sum(served["cached"][:asked]), sum(served["cached"][asked:])
    if case.caching:
        assert 0 < first < again
    else:
        assert first == again == 0


def test_an_image_is_part_of_the_prompt(results: dict[str, dict[str, Any]]) -> None:
    """Prompts of the same tokens with two images: the first time, the second finds nothing from the image on."""
    case = next(case for case in CASES if case.images)
    result = results[case.name]["elastic"]
    prompts = case.job()["prompts"]
    pairs = [
        (first, second)
        for first, one in enumerate(prompts)
        for second, other in enumerate(prompts[:first])
        if one["tokens"] == other["tokens"] and one["images"] != other["images"]
    ]
    assert pairs
    for first, second in pairs:
        assert result["answers"][first]["tokens"] != result["answers"][second]["tokens"]
        before_image = prompts[first]["tokens"].index(3)
        assert result["cached"][first] <= before_image
