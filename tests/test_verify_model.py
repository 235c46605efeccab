"""The shipped model, the task that it answers, and the tools that trained it; with transformers alone."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")  # transformers too, but not before evaluate.load, which lets it import
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import delta_rule
import evaluate
import hybrid
import torch
import train
from batches import FACT, REGISTER, training_batch, training_text
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tidepool.verify.task import (
    ANSWER_TOKENS,
    MODEL,
    WORDS,
    Kind,
    Question,
    make_conversation,
    make_prompts,
    make_story,
    to_text,
    to_tokens,
)

# The task ---------------------------------------------------------------------------------------------------


def told(text: str) -> dict[str, str]:
    """The right answer to each question, read off a text from left to right."""
    answers, sentence = {}, list[str]()
    for word in text.split():
        sentence.append(word)
        match sentence:
            case ["note" | "set", *key, a, b, c, "."]:
                answers["ask " + " ".join(key)] = f"{a} {b} {c} ."
        if word == ".":
            sentence.clear()
    return answers


@pytest.mark.parametrize("length", [60, 700, 4000])
def test_answers_follow_from_the_text(length: int) -> None:
    for seed in range(20):
        story = make_story(seed, length)
        assert len(story.tokens) == length
        asked = {to_text(question.tokens): to_text(question.answer) for question in story.questions()}
        assert asked == told(to_text(story.tokens))
        for question in story.questions():
            assert to_text(story.tokens[question.told :]).startswith(("note ", "set "))
            assert WORDS[story.tokens[question.told + 1]] == to_text(question.tokens).split()[1]
            assert question.is_right([*question.answer, 7])
            assert not question.is_right(question.answer[:-1])


def test_the_age_of_values_varies() -> None:
    ages = [1 - question.told / 4000 for seed in range(20) for question in make_story(seed, 4000).questions("register")]
    assert sum(age > 0.5 for age in ages) > len(ages) / 4
    assert sum(age < 0.25 for age in ages) > len(ages) / 10


def test_prompts_share_their_story() -> None:
    prompts = make_prompts(3, length=500, stories=2, questions=4)
    assert prompts == make_prompts(3, length=500, stories=2, questions=4)
    assert prompts != make_prompts(4, length=500, stories=2, questions=4)
    assert len({tuple(prompt.tokens[:497]) for prompt in prompts}) == 2
    assert len({tuple(prompt.tokens) for prompt in prompts}) == 8
    assert [prompt.question.kind for prompt in prompts[:4]] == ["fact", "register", "fact", "register"]
    assert max(len(prompt.tokens) for prompt in prompts) == 500
    assert {p.question.kind for p in make_prompts(3, length=500, stories=2, questions=3, kind="register")} == {
        "register"
    }


def test_a_conversation_grows() -> None:
    prompts = make_conversation(5, length=1000, turns=6)
    assert len(prompts) == 6
    for before, after in pairwise(prompts):
        begin = [*before.tokens, *before.question.answer]
        assert after.tokens[: len(begin)] == begin
    assert 900 < len(prompts[-1].tokens) <= 1000
    assert len({prompt.question.tokens for prompt in prompts}) == 6


def test_branches_share_what_was_told_before() -> None:
    story = make_story(1, 400)
    first, second = story.branch(1), story.branch(2)
    first.tell(200)
    second.tell(200)
    assert len(story.tokens) == 400
    assert first.tokens[:400] == second.tokens[:400] == story.tokens
    assert first.tokens != second.tokens
    assert {to_text(q.tokens): to_text(q.answer) for q in first.questions()} == told(to_text(first.tokens))


def test_too_short_a_story_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        make_story(0, 9)


# The model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return evaluate.load()


def test_checkpoint_is_small_and_of_the_trained_shape() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 8e6
    assert json.loads((MODEL / "config.json").read_text()) == hybrid.CONFIG | {"vocab_size": len(WORDS)}
    kinds = hybrid.CONFIG["layer_types"]
    assert kinds.count("linear_attention") == 3 * kinds.count("full_attention")


def test_tokenizer_is_the_tasks_vocabulary() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = "note ann boat 4 7 2 . the tide waits . set red 0 1 9 . ask red"
    assert tokenizer.get_vocab_size() == len(WORDS)
    assert tokenizer.encode(text).ids == to_tokens(text)
    assert tokenizer.decode(to_tokens(text)) == text == to_text(to_tokens(text))
    assert tokenizer.encode("Ann <end>").ids == [1, 0]


@pytest.mark.parametrize("length", [200, 1500])
def test_answers_are_right_by_a_wide_margin(model: Any, length: int) -> None:
    prompts = make_prompts(11, length=length, stories=4, questions=4)
    assert len(prompts) == 16
    for story, questions in evaluate.by_story(prompts):
        cache = evaluate.read(model, story)
        for question in questions:
            output, margin = evaluate.answer(model, cache, question)
            assert question.is_right(output)
            assert margin > 5


def test_a_conversation_is_answered(model: Any) -> None:
    cache, seen = None, 0
    for prompt in make_conversation(2, length=600, turns=4):
        cache = evaluate.read(model, prompt.tokens[seen : -len(prompt.question.tokens)], cache)
        seen = len(prompt.tokens) - len(prompt.question.tokens)
        assert prompt.question.is_right(evaluate.answer(model, cache, prompt.question)[0])


def share_right(model: Any, cache: Any, questions: list[Question], kind: Kind, place: range) -> float:
    """Of the questions of a kind whose value was told in ``place``; there must be some."""
    asked = [question for question in questions if question.kind == kind and question.told in place][:6]
    assert asked
    return sum(question.is_right(evaluate.answer(model, cache, question)[0]) for question in asked) / len(asked)


def test_damage_shows(model: Any) -> None:
    """Without states registers are lost, without keys and values facts, and each stands without the other."""
    for seed in (1, 4):
        story = make_story(seed, 1024)
        questions = story.questions()
        cache = evaluate.damaged(model, story.tokens, 512, evaluate.zero_states)
        assert share_right(model, cache, questions, "register", range(512)) < 0.2
        assert share_right(model, cache, questions, "fact", range(512)) > 0.8
        cache = evaluate.damaged(model, story.tokens, 768, evaluate.zero_keys(256, 768))
        assert share_right(model, cache, questions, "fact", range(256, 760)) < 0.2
        assert share_right(model, cache, questions, "fact", range(240)) > 0.8
        assert share_right(model, cache, questions, "register", range(1024)) > 0.8


# Training ---------------------------------------------------------------------------------------------------

SMALL = hybrid.CONFIG | {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}


def test_delta_rule_is_that_of_transformers(model: Any) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    torch.manual_seed(0)
    inputs = [torch.randn(2, 192, 3, 16) for _ in range(3)] + [-torch.rand(2, 192, 3), torch.rand(2, 192, 3)]
    inputs[1][:, 64:128] = inputs[1][:, :1]  # equal keys, for which a careless inverse blows up
    inputs = [x.requires_grad_() for x in inputs]
    ours = delta_rule.gated_delta_rule(*inputs)
    theirs, _ = torch_chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_trained_function_is_that_of_transformers(model: Any) -> None:
    weights = {name: weight.float() for name, weight in load_file(MODEL / "model.safetensors").items()}
    ours = hybrid.Hybrid(hybrid.CONFIG | {"vocab_size": len(WORDS)})
    ours.load_state_dict(weights)
    theirs = type(model)(model.config).float()
    theirs.load_state_dict(weights)
    tokens = torch.tensor([make_story(0, 256).tokens])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-3)


def test_training_texts_mark_right_answers() -> None:
    for seed in range(10):
        tokens, marks = training_text(seed, 512)
        assert len(tokens) == len(marks) == 512
        starts = [place for place, mark in enumerate(marks) if mark in (FACT, REGISTER)]
        assert len(starts) > 5
        for start in starts:
            kind_tokens = 3 if marks[start] == FACT else 2
            before = told(to_text(tokens[: start - kind_tokens]))
            asked = to_text(tokens[start - kind_tokens : start])
            assert to_text(tokens[start : start + ANSWER_TOKENS]) == before[asked]


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def trained(steps: range, path: Path | None) -> Any:
        trainer = train.Trainer(SMALL, 0, "cpu", 256)
        if path:
            assert trainer.load(path)["step"] == steps.start
        for step in steps:
            trainer.step(128, training_batch(0, step, 2, 128), 1e-3)
        return trainer

    first = trained(range(2), None)
    first.save(tmp_path, {"step": 2})
    resumed, whole = trained(range(2, 4), tmp_path), trained(range(4), None)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0)
