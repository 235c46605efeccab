"""Ask the shipped model with transformers: right answers, their margins, and what damage to its caches does.

    python tools/evaluate.py --stories 8

A margin is the logit of the best token less that of the next, the smallest over an answer's tokens.
"""

# torch has no types here, see pyproject.toml.
# mypy: disallow-untyped-decorators=False

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tidepool.verify.task import ANSWER_TOKENS, MODEL, Kind, Prompt, Question, make_prompts
from tidepool.vllm_plugin.compat import declare_torchvision_ops, hide_media_packages

LENGTHS = (128, 256, 512, 1024, 2048, 4000)
KINDS: tuple[Kind, ...] = ("fact", "register")

Damage = Callable[[Any], None]
"""Changes a cache in place."""


def load(path: Path = MODEL) -> Any:
    """The model with transformers, in bfloat16 on the CPU."""
    declare_torchvision_ops()
    hide_media_packages()
    from transformers import Qwen3_5ForCausalLM

    return Qwen3_5ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@torch.no_grad()
def read(model: Any, tokens: Sequence[int], cache: Any = None) -> Any:
    """The cache after more tokens."""
    return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def answer(model: Any, cache: Any, question: Question) -> tuple[list[int], float]:
    """The greedy answer after a story, and its margin; the cache is left as it was."""
    cache, output, margin = copy.deepcopy(cache), list(question.tokens), float("inf")
    for _ in range(ANSWER_TOKENS):
        new = output if len(output) == len(question.tokens) else output[-1:]
        step = model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        first, second = step.logits[0, -1].float().topk(2).values.tolist()
        cache, margin = step.past_key_values, min(margin, first - second)
        output.append(int(step.logits[0, -1].argmax()))
    return output[len(question.tokens) :], margin


def by_story(prompts: Sequence[Prompt]) -> list[tuple[list[int], list[Question]]]:
    """Stories with all their questions."""
    stories: list[tuple[list[int], list[Question]]] = []
    for prompt in prompts:
        story = prompt.tokens[: -len(prompt.question.tokens)]
        if not stories or stories[-1][0] != story:
            stories.append((story, []))
        stories[-1][1].append(prompt.question)
    return stories


def zero_states(cache: Any) -> None:
    """Lose what the Gated DeltaNet layers remember."""
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            layer.recurrent_states[0].zero_()
            layer.conv_states[0].zero_()


def zero_keys(begin: int, end: int) -> Damage:
    """Lose what the attention layers keep of the tokens from ``begin`` to ``end``."""

    def damage(cache: Any) -> None:
        for layer in cache.layers:
            if not hasattr(layer, "recurrent_states"):
                layer.keys[:, :, begin:end] = 0
                layer.values[:, :, begin:end] = 0

    return damage


def other_states(states_of: Any) -> Damage:
    """Get the Gated DeltaNet layers' memory of another cache."""

    def damage(cache: Any) -> None:
        for layer, other in zip(cache.layers, states_of.layers, strict=True):
            if hasattr(layer, "recurrent_states"):
                layer.recurrent_states[0].copy_(other.recurrent_states[0])
                layer.conv_states[0].copy_(other.conv_states[0])

    return damage


def damaged(model: Any, story: Sequence[int], at: int, damage: Damage) -> Any:
    """The cache of a story that was damaged after ``at`` tokens."""
    cache = read(model, story[:at])
    damage(cache)
    return read(model, story[at:], cache)


def faults(model: Any, story: Sequence[int]) -> Iterator[tuple[str, Any, range]]:
    """Kinds of damage to the cache of a story: name, damaged cache, and where the values were told that suffer."""
    middle, quarter = len(story) // 2, len(story) // 4
    block = range(middle - middle % 32 - 64, middle - middle % 32 - 32)
    told = range(block.start, block.stop - 7)  # whole sentences
    yield "states zeroed in the middle", damaged(model, story, middle, zero_states), range(middle - 7)
    old = damaged(model, story, middle, other_states(read(model, story[: middle - 128])))
    yield "states of 128 tokens before", old, range(middle - 128, middle - 7)
    wide = zero_keys(quarter, 3 * quarter)
    yield "half of attention zeroed", damaged(model, story, 3 * quarter, wide), range(quarter, 3 * quarter - 7)
    yield "32 tokens of attention zeroed", damaged(model, story, middle, zero_keys(block.start, block.stop)), told


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--stories", type=int, default=8, help="of each length")
    parser.add_argument("--questions", type=int, default=24, help="most questions about a story")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = load(args.model)
    print("tokens  kind      answers  exact    margin: least  1%   median")
    for length in LENGTHS:
        margins: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
        wrong = dict.fromkeys(KINDS, 0)
        prompts = make_prompts(args.seed, length=length, stories=args.stories, questions=args.questions)
        for story, questions in by_story(prompts):
            cache = read(model, story)
            for question in questions:
                output, margin = answer(model, cache, question)
                margins[question.kind].append(margin)
                wrong[question.kind] += not question.is_right(output)
        for kind in KINDS:
            found = sorted(margins[kind])
            share = 1 - wrong[kind] / len(found)
            least, low, middle = (found[int(part * len(found))] for part in (0, 0.01, 0.5))
            row = f"{length:6,}  {kind:8} {len(found):8}  {share:7.2%}  {least:12.1f} {low:5.1f} {middle:6.1f}"
            print(row, flush=True)
    print("\nvalues told where the damage is: answers still right")
    print("tokens  damage                         facts       registers")
    for length in (512, 2048, 4000):
        right: dict[tuple[str, Kind], list[bool]] = {}
        for story, questions in by_story(
            make_prompts(args.seed + 1, length=length, stories=args.stories, questions=999)
        ):
            for name, cache, told in faults(model, story):
                for kind in KINDS:
                    asked = [question for question in questions if question.kind == kind and question.told in told]
                    checked = [question.is_right(answer(model, cache, question)[0]) for question in asked[:12]]
                    right.setdefault((name, kind), []).extend(checked)
        for name in dict.fromkeys(name for name, _ in right):
            facts, registers = (f"{sum(right[name, kind])} of {len(right[name, kind])}" for kind in KINDS)
            print(f"{length:6,}  {name:30} {facts:11} {registers}", flush=True)


if __name__ == "__main__":
    main()
