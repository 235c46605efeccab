"""`tidepool verify MODEL`: when a model of one's own passes beside stock vLLM."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidepool.cli import app
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.verify.own_model import Made, bound_of, compare, failures

ANSWER = [7, 8, 9]
LIKELY = [{"7": -0.1, "1": -3.0}, {"8": -0.2, "2": -0.9}, {"9": -0.3, "3": -2.5}]
STOCK = Made(
    answers=[ANSWER, ANSWER],
    logprobs=[LIKELY, LIKELY],
    kv_bytes=1_000_000,
    other_step_tokens=512,
    step_seconds=0.010,
    hit_tokens=64,
    preemptions=0,
    in_use_at_end=0.0,
)
SAME = compare("stock vLLM", STOCK, STOCK)


def answered(second: list[int]) -> Made:
    return replace(STOCK, answers=[ANSWER, second])


def test_equal_answers_pass() -> None:
    ours = compare("tidepool", STOCK, replace(STOCK, step_seconds=0.011))
    assert ours.gaps == []
    assert ours.ratio == pytest.approx(1.1)
    assert failures(SAME, ours) == []


@pytest.mark.parametrize(
    ("second", "gap", "passes"),
    [([7, 2, 9], 0.7, True), ([1, 8, 9], 2.9, False), ([7, 8, 5], float("inf"), False)],
    ids=["two tokens as good as equal", "a token that stock vLLM found far worse", "one it didn't think of"],
)
def test_answers_may_part_where_two_tokens_are_as_good_as_equal(second: list[int], gap: float, passes: bool) -> None:
    ours = compare("tidepool", STOCK, answered(second))
    assert ours.gaps == [pytest.approx(gap)]
    assert (failures(SAME, ours) == []) is passes


def test_stock_noise_is_the_bound_where_it_is_larger() -> None:
    noise = compare("stock vLLM, other steps", STOCK, answered([7, 8, 3]))
    assert bound_of(SAME) == BFLOAT16_GAP
    assert bound_of(noise) == pytest.approx(2.2)
    assert failures(noise, compare("tidepool", STOCK, answered([7, 8, 3]))) == []
    assert failures(noise, compare("tidepool", STOCK, answered([1, 8, 9]))) == [
        "1 answers part from stock vLLM's by more than 2.20."
    ]


def test_a_token_out_of_nowhere_is_no_bound() -> None:
    assert bound_of(compare("stock vLLM, other steps", STOCK, answered([7, 8, 5]))) == BFLOAT16_GAP


def test_memory_left_in_use_fails() -> None:
    ours = compare("tidepool", STOCK, replace(STOCK, in_use_at_end=0.25))
    assert failures(SAME, ours) == ["25.0% of the memory is in use after the last request."]


@pytest.mark.vllm
def test_a_tiny_model_passes(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from tidepool.testing.tiny import make_checkpoint

    model = make_checkpoint("nemotron-h", tmp_path / "model")
    options = ["--enable-prefix-caching", "--kv-cache-memory-bytes", "60000000", "--max-model-len", "2048"]
    result = CliRunner().invoke(
        app,
        ["verify", "--workdir", str(tmp_path), "--json", str(tmp_path / "out.json"), str(model), *options],
    )
    assert result.exit_code == 0, result.output
    stock, other, ours = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert stock["made"]["kv_bytes"] == ours["made"]["kv_bytes"] == 60_000_000
    assert other["made"]["other_step_tokens"] > 0
    assert ours["made"]["hit_tokens"] > 0
    assert ours["ratio"] > 0
