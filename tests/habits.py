"""Prompts for tiny models that drafts can guess: they follow the model's own habit, mostly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def make_habit(model: Path) -> Callable[[int], list[int]]:
    """Makes so many tokens that follow the model's own habit.

    By itself the model follows a cycle of tokens (`tidepool.testing.tiny`), and so do prompts, with jumps: so what it
    answers has mostly stood in the prompt, and goes on otherwise where its layers have it so.
    """
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    embedding = next(weights[name] for name in weights if "embed" in name)
    follower = (weights["lm_head.weight"].float() @ embedding.float().T).argmax(0).tolist()
    rng = random.Random(5)

    def some(count: int) -> list[int]:
        tokens = [rng.randrange(5, 500)]
        while len(tokens) < count:
            tokens.append(rng.randrange(5, 500) if rng.random() < 0.08 else follower[tokens[-1]])
        return tokens

    return some


def tiny_prompts(model: Path) -> list[list[int]]:
    """Prompts of which every other begins like two others."""
    some = make_habit(model)
    rng = random.Random(5)
    shared = [some(150), some(200)]
    prompts = []
    for number in range(12):
        start = shared[number // 2 % 2] if number % 2 else []
        prompts.append(start + some(rng.randrange(306, 317) - len(start)))
    return prompts
