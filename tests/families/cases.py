"""What is asked of each family of `tidepool.testing.tiny`, through stock vLLM and through tidepool."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tidepool.testing.tiny import Family, make_checkpoint

IMAGE_TOKEN = 5
"""Stands for an image in the prompts of ``qwen3.5-vl``; vLLM puts as many there as the image takes."""
VISION_START, VISION_END = 3, 4
ROUNDS = ("prompts", "prompts", "prompts", "others", "prompts")
"""What is asked at once, one after the other: by the third time all is cached, and the others take memory from it."""


@dataclass(frozen=True)
class Case:
    """A family, and how it is served and asked."""

    family: Family
    kv_bytes: int
    """Room for all that the prompts leave, and not for the others beside it."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's configuration."""
    caching: bool = True
    images: bool = False
    """Whether some prompts come with an image."""
    max_num_seqs: int = 4
    output_tokens: int = 12

    @property
    def name(self) -> str:
        """Its name in a table."""
        also = ["windows"] * ("sliding_window" in self.config) + ["no caching"] * (not self.caching)
        return ", ".join([self.family, *also])

    def job(self) -> dict[str, Any]:
        """The case as JSON knows it, with its prompts and when they are asked."""
        return asdict(self) | {"rounds": ROUNDS, "prompts": make_prompts(images=self.images), "others": make_others()}


EXACT = {"dtype": "float32"}
"""Where vLLM's kernels take it: faster on most processors, and outputs part at next to nothing."""
CASES = (
    Case("qwen3.5-vl", 42_000_000, images=True),
    Case("qwen3.5-moe", 31_000_000),
    Case("qwen3-next", 30_000_000),
    Case("falcon-h1", 60_000_000, EXACT),
    Case("granite-4-h", 28_000_000, EXACT),
    Case("granite-4-h-moe", 28_000_000, EXACT),
    Case("nemotron-h", 45_000_000, EXACT, {"sliding_window": 128}),
    Case("zamba2", 60_000_000, EXACT),
    Case("zamba2", 60_000_000, EXACT, caching=False),
    Case("lfm2", 4_200_000, EXACT),
    Case("lfm2-moe", 4_200_000, EXACT),
)


def checkpoint_of(case: Case, root: Path) -> Path:
    """The case's model, made under ``root``."""
    path = make_checkpoint(case.family, root / case.name)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | case.config))
    return path


def make_prompts(*, images: bool) -> list[dict[str, Any]]:
    """Prompts as ``{"tokens": [...], "images": [seed, ...]}``: two beginnings with several ends each, and others.

    With images the beginnings are those of two pairs that have the same tokens and not the same image.
    """
    rng = random.Random(11)

    def some(count: int) -> list[int]:
        return [rng.randrange(7, 500) for _ in range(count)]

    shared = [some(130), some(560)]
    prompts = [{"tokens": shared[number % 2] + some(40), "images": []} for number in range(6)]
    prompts += [{"tokens": some(count), "images": []} for count in (20, 300)]
    if images:
        picture = [VISION_START, IMAGE_TOKEN, VISION_END]
        ends = [some(40), some(40)]
        for seed in (1, 2):
            prompts += [{"tokens": [*shared[0], *picture, *end], "images": [seed]} for end in ends]
        prompts.append({"tokens": [*picture, *shared[0], *picture, *some(40)], "images": [1, 2]})
    return prompts


def make_others() -> list[dict[str, Any]]:
    """Long prompts that share nothing, to take memory from what is cached."""
    rng = random.Random(12)
    return [{"tokens": [rng.randrange(7, 500) for _ in range(1_000)], "images": []} for _ in range(4)]
