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

pytestmark = pytest.mark.vllm
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
    reference = {answered["asked"]: answered for answered in stock["rounds"]}
    answers = tokens(reference["prompts"])
    # Two prompts of a family may begin their answers alike.
    assert len({tuple(answer) for answer in answers}) >= len(answers) - 1, (
        "outputs that don't discriminate prove nothing"
    )
    for answered in stock["rounds"] + served["rounds"]:
        numbers = (number for each in answered["answers"] for step in each["logprobs"] for number in step.values())
        assert not any(math.isnan(number) for number in numbers)
    for number, answered in enumerate(served["rounds"]):
        found = gaps(reference[answered["asked"]], answered)
        assert all(gap <= (FLOAT32_GAP if "dtype" in case.engine else BFLOAT16_GAP) for gap in found), (number, found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_comes_back_hits_and_what_others_need_is_evicted(results: dict[str, dict[str, Any]], case: Case) -> None:
    """A short prompt leaves a state at its end when it is seen to come back, so it hits the third time."""
    result = results[case.name]
    stock, served = ([sum(answered["cached"]) for answered in result[side]["rounds"]] for side in ("stock", "elastic"))
    assert not any(stock)
    if not case.caching:
        assert not any(served)
        return
    first, second, third, others, fourth = served
    assert first < second <= third
    assert third >= 0.9 * sum(len(prompt["tokens"]) for prompt in case.job()["prompts"])
    assert others == 0
    assert fourth < third, "nothing was evicted"


def test_an_image_is_part_of_the_prompt(results: dict[str, dict[str, Any]]) -> None:
    """Prompts of the same tokens with two images: the first time, the second finds nothing from the image on."""
    case = next(case for case in CASES if case.images)
    result = results[case.name]["elastic"]["rounds"][0]
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
