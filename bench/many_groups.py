"""How many short requests run at once on models of many groups, stock vLLM against tidepool, on the real engine core.

    python bench/many_groups.py [--memory 24GB] [--prompt 12] [--requests 600] [--json FILE]

Two models with the caches of GLM-5.3-Flash's language model (34 layers with states of 4.1 MiB, 11 with 1 KiB a token):

drafter   two more layers of a drafter, with pages of their own. vLLM makes all groups as large as the smallest kind,
          two layers, and so cuts the others into pieces.
kinds     22 attention layers, each of which keeps its tokens in another odd size, as with codes of different widths
          (bench/glm_like). `--layer-kv-dtype` gives the same to tidepool plan and tidepool replay.

Each engine is in a process of its own. Only the model is left out; see docs/replay.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

MODELS = ("drafter", "kinds")
SIDES = ("stock", "elastic")
MARK = "many_groups: "
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
OUTPUT_TOKENS = 8


GLM_LIKE = Path(__file__).with_name("glm_like")


def config(model: str) -> dict[str, Any]:
    """A Qwen3.5 whose layers keep as much as those of GLM-5.3-Flash; no weights are made."""
    from tidepool.models import read_config

    made = read_config(GLM_LIKE)
    if model == "kinds":
        return made
    layer_types = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(45)]
    return made | {"num_hidden_layers": 45, "layer_types": layer_types}


def kinds() -> list[tuple[int | str, str]]:
    """How each attention layer of `GLM_LIKE` keeps its tokens."""
    layers = [index for index, kind in enumerate(config("kinds")["layer_types"]) if kind == "full_attention"]
    return [(layer, f"{516 + 12 * number}B") for number, layer in enumerate(layers)]


def change_specs(model: str, specs: dict[str, Any]) -> dict[str, Any]:
    """vLLM's specs of the model's layers, changed to what this model has."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    from tidepool.replay.engine import typed_layers

    if model == "kinds":
        return typed_layers(specs, kinds())
    plain = next(spec for spec in specs.values() if isinstance(spec, AttentionSpec))
    return specs | {f"drafter.{index}": replace(plain, num_kv_heads=2, head_size=128) for index in range(2)}


def is_state(spec: Any) -> bool:
    """Whether a group of layers with this spec keeps states."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return isinstance(getattr(spec, "first_spec", spec), MambaSpec)


def child(model: str, side: Any, memory: int, prompt: int, requests: int) -> dict[str, Any]:
    """Serve one batch; the most requests that ran at once."""
    from tidepool.replay import engine as replay
    from tidepool.replay.step import take_step

    shape = replay.EngineShape(
        config(model),
        memory,
        side,
        max_num_seqs=1024,
        max_model_len=32_768,
        prefix_caching=False,
        change_specs=partial(change_specs, model),
    )
    engine = replay.make_checked_engine(shape)
    layout = engine.scheduler.kv_cache_config
    for index in range(requests):
        tokens = [(7 * index + place) % 1000 for place in range(prompt)]
        replay.add_request(engine, str(index), tokens, OUTPUT_TOKENS)
    peak, seconds = 0, []
    while engine.scheduler.has_requests():
        step = take_step(engine)
        peak = max(peak, len(step.output.num_scheduled_tokens))
        seconds.append(step.scheduler_seconds / max(1, len(step.output.num_scheduled_tokens)))
    attention = [g.kv_cache_spec.block_size for g in layout.kv_cache_groups if not is_state(g.kv_cache_spec)]
    padding = layout.geometry.padding if side != "stock" else None
    return {
        "groups": len(layout.kv_cache_groups),
        "block_tokens": max(attention),
        "at_once": peak,
        "scheduler_us_per_request": 1e6 * median(seconds),
        "padding": padding,
    }


def run(model: str, side: str, arguments: list[str]) -> dict[str, Any]:
    """`child` in a process of its own; what vLLM says where it refuses."""
    command = [sys.executable, __file__, *arguments, "--child", model, side]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK)))
    return {"refused": next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "it ended")}


def main() -> None:
    from tidepool.sizes import parse_size

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--prompt", type=int, default=12)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, side = args.child
        print(MARK + json.dumps(child(model, side, parse_size(args.memory), args.prompt, args.requests)), flush=True)
        return
    print(f"Requests of {args.prompt} tokens at once on {args.memory} of KV memory.")
    print(
        f"{'model':<9} {'side':<9} {'groups':>7} {'attention block':>16} {'padding':>8} {'at once':>8} "
        f"{'scheduler a request':>20}"
    )
    results = {}
    for model in MODELS:
        for side in SIDES:
            given = ["--memory", args.memory, "--prompt", str(args.prompt), "--requests", str(args.requests)]
            made = results[f"{model} {side}"] = run(model, side, given)
            if "refused" in made:
                print(f"{model:<9} {side:<9} refuses: {made['refused'][:200]}", flush=True)
                continue
            print(
                f"{model:<9} {side:<9} {made['groups']:>7} {made['block_tokens']:>9,} tokens "
                f"{'-' if made['padding'] is None else format(made['padding'], '.2%'):>8} {made['at_once']:>8} "
                f"{made['scheduler_us_per_request']:>17.0f} us",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
