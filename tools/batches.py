"""Training texts: stories with questions and answers in between, and a long examination at the end."""

import random

import numpy as np
from numpy.typing import NDArray

from tidepool.verify.task import ANSWER_TOKENS, Question, Story

NO_ANSWER, FACT, REGISTER, REST = range(4)
"""Marks of tokens: outside answers, the first token of an answer of either kind, and its other tokens."""

_TRAINING = 1 << 80
"""Seeds of training texts start here, far beyond those that tests and evaluations use."""


def training_text(seed: int, length: int) -> tuple[list[int], list[int]]:
    """Tokens and their marks."""
    rng = random.Random(seed)
    body = int(length * rng.uniform(0.5, 0.9))
    pause = rng.randint(10, 80)
    story = Story(seed + _TRAINING, body)
    marks: list[int] = []

    def ask(question: Question) -> None:
        marks.extend([NO_ANSWER] * (len(story.tokens) + len(question.tokens) - len(marks)))
        marks.extend([FACT if question.kind == "fact" else REGISTER] + [REST] * (ANSWER_TOKENS - 1))
        story.ask(question)

    while len(story.tokens) < body:
        story.tell(rng.randint(5, 2 * pause))
        questions = story.questions(rng.choice(("fact", "register")))
        if questions:
            ask(rng.choice(questions))
    facts, registers = story.questions("fact"), story.questions("register")
    rng.shuffle(facts)
    rng.shuffle(registers)
    while facts or registers:
        if rng.random() < 0.2:
            story.tell(rng.randint(1, 30))
        # What is told now may set a register anew: facts stay, registers are looked up again.
        if facts and (not registers or rng.random() < 0.5):
            question = facts.pop()
        else:
            key = registers.pop().tokens
            question = next(now for now in story.questions("register") if now.tokens == key)
        if len(story.tokens) + len(question.tokens) + ANSWER_TOKENS > length:
            break
        ask(question)
    story.tell(length - len(story.tokens))
    return story.tokens[:length], (marks + [NO_ANSWER] * length)[:length]


def training_batch(seed: int, step: int, texts: int, length: int) -> NDArray[np.int16]:
    """Tokens and marks of one step, [2, texts, length]; the same arguments give the same batch."""
    pairs = [training_text((seed << 60) + (step << 20) + row, length) for row in range(texts)]
    return np.array([[tokens for tokens, _ in pairs], [marks for _, marks in pairs]], dtype=np.int16)
