"""What host memory behind the cache is worth on one GPU: conversations that come back, more than the device holds.

    python bench/gpu_host.py [--model Qwen3.5-4B] [--memory BYTES] [--host GIB] [--json FILE]

The shape of a real model with dummy weights, so nothing is downloaded. Four engines on the same bytes: stock vLLM and
tidepool, each without host memory and with (vLLM's own ``--kv-offloading-size``, which tidepool takes over). All are
started first, then run one after the other. A turn asks every conversation once, a few at a time; each prompt is the
one before and more.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from gpu_check import MARK, engine_arguments, environment, write_config
from tidepool.sides import Side

SIDES = ("stock", "stock+host", "elastic", "elastic+host")


def conversations(args: argparse.Namespace) -> list[list[list[int]]]:
    """By turn and conversation, the prompts' tokens."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(args.vocabulary // 100, args.vocabulary) for _ in range(count)]

    turns = [[some(args.prompt) for _ in range(args.conversations)]]
    for _ in range(args.turns - 1):
        turns.append([prompt + some(args.more) for prompt in turns[-1]])
    return turns


def serve(args: argparse.Namespace) -> None:
    """One side: an engine that runs all turns when it is told to."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from tidepool.running.engine import core_of, require_side

    side: Side
    side, _, host = args.child.partition("+")
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=args.model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=args.prompt + args.turns * args.more + args.answer,
            max_num_seqs=64,
            max_num_batched_tokens=args.step,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=args.memory,
            kv_offloading_size=args.host if host else None,
            gpu_memory_utilization=0.2,
            additional_config={"tidepool": {"allow": ["device", "host-memory"]}},
            **engine_arguments(args.mode, args.backend),
        )
    )
    core = core_of(engine)
    require_side(side, core)
    turns = conversations(args)
    print(MARK + "ready", flush=True)
    sys.stdin.readline()
    found = []
    for number, prompts in enumerate(turns):
        waiting, waits = list(enumerate(prompts)), list[float]()
        under_way: dict[str, float] = {}
        """When each was sent; 0 from its first token on."""
        hit, began = 0, time.perf_counter()
        while waiting or under_way:
            while waiting and len(under_way) < args.at_once:
                index, prompt = waiting.pop(0)
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=args.answer,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                name = f"{number}-{index}"
                under_way[name] = time.perf_counter()
                engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            for output in engine.step():
                sent = under_way.get(output.request_id)
                if sent:  # its first tokens
                    waits.append(time.perf_counter() - sent)
                    under_way[output.request_id] = 0.0
                    hit += output.num_cached_tokens or 0
                if output.finished:
                    del under_way[output.request_id]
        seconds = time.perf_counter() - began
        prompt_tokens = sum(map(len, prompts))
        found.append({"seconds": seconds, "hit_tokens": hit, "prompt_tokens": prompt_tokens, "first_token_s": waits})
    host_memory = getattr(core.scheduler.kv_cache_manager, "host", None)
    traffic = dict(vars(host_memory.traffic)) if host_memory else {}
    print(MARK + json.dumps({"turns": found, "traffic": traffic}), flush=True)


class Engine:
    """A side's process."""

    def __init__(self, side: str, runner: int, arguments: Sequence[str], logs: Path) -> None:
        self.side = side
        self._log = (logs / f"host-{side}.log").open("w", buffering=1, encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", side, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(side.partition("+")[0], runner, poison=False, processes=False),
        )

    def receive(self) -> str | None:
        """Its next answer; None when it has ended."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
            self._log.write(line)
        return None

    def run(self) -> dict[str, Any] | None:
        """Have it run all turns."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        made = self.receive()
        self._process.kill()
        return dict(json.loads(made)) if made else None


def show(side: str, made: dict[str, Any]) -> None:
    """A line for each side: what came back in all turns but the first."""
    later = made["turns"][1:]
    waits = [wait for turn in later for wait in turn["first_token_s"]]
    hit = sum(turn["hit_tokens"] for turn in later) / sum(turn["prompt_tokens"] for turn in later)
    traffic = made["traffic"]
    words = f"{side:<14} {hit:>8.1%} {mean(waits) * 1e3:>10.1f} {median(waits) * 1e3:>10.1f}"
    words += f" {sum(turn['seconds'] for turn in later):>8.2f}"
    if traffic:
        words += f"   {traffic['loads']} loads, {traffic['loaded_bytes'] / 1e9:.1f} GB"
        words += f", {traffic['stored_bytes'] / 1e9:.1f} GB stored, {traffic['failed']} failed"
    print(words, flush=True)


def main() -> None:
    """Parse the command line; run the engines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="Qwen3.5-4B", help="of tidepool's catalogue, or a folder")
    parser.add_argument("--memory", type=int, default=6 << 30, help="bytes on the device")
    parser.add_argument("--host", type=float, default=24.0, help="GiB of host memory")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=6_000, help="tokens at first")
    parser.add_argument("--more", type=int, default=500, help="tokens that each turn adds")
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--step", type=int, default=8_192, help="max_num_batched_tokens")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--runner", type=int, default=2, help="vLLM's first or second model runner")
    parser.add_argument("--mode", default="compile", help="eager, graphs or compile")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--vocabulary", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args)
        return
    with TemporaryDirectory() as temporary:
        model = Path(args.model)
        if not model.is_dir():
            model = write_config(args.model, Path(temporary))
        logs = args.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        engines = [Engine(side, args.runner, [*sys.argv[1:], "--model", str(model)], logs) for side in args.sides]
        with ThreadPoolExecutor(len(engines)) as pool:
            ready = list(pool.map(Engine.receive, engines))
        print(f"{args.model}, dummy weights, {args.memory:,} bytes on the device, {args.host:g} GiB of host memory")
        print(f"{args.conversations} conversations of {args.prompt:,} tokens, {args.turns} turns of {args.more} more")
        print(f"{'':<14} {'hits':>8} {'TTFT ms':>10} {'median':>10} {'s':>8}   all turns but the first")
        results = {}
        for engine, is_ready in zip(engines, ready, strict=True):
            made = engine.run() if is_ready else None
            if made is None:
                print(f"{engine.side:<14} FAILED; see --logs", flush=True)
                continue
            results[engine.side] = made
            show(engine.side, made)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
