"""Processor time of vLLM's scheduler per step, stock against tidepool, on the real engine core without a model.

    python bench/scheduler_cpu.py [--rounds 7] [--running 64] [--memory 16GiB] [--json FILE] [--profile DIRECTORY]
    python bench/scheduler_cpu.py --workload agents [--sessions 16] [--memory 40GiB] [--block-size 16]

Each side is an engine in a process of its own. The sides take turns: one serves a round of requests while the other
waits, so that both see the same machine. Counted is the processor time of `Scheduler.schedule` and
`Scheduler.update_from_output`, in steps with all of `--running` requests running.

With ``--workload agents`` a round is the next turn of each of some sessions, whose prompts of 30,000 tokens and more
contain all that was said before. There every step counts: what is looked up, found and given back is in few of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

MODELS = ("Qwen3.5-4B", "Nemotron-3-Nano-4B")
SIDES = ("stock", "elastic")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
MARK, REFUSED = "scheduler_cpu: ", "refused: "


def requests(seed: int, running: int) -> list[tuple[list[int], int]]:
    """Prompts and output lengths of a round: four times as many as run at once, half with a common prefix."""
    rng = random.Random(seed)
    common = [rng.randrange(100_000) for _ in range(1_024)]
    made = []
    for index in range(4 * running):
        own = [rng.randrange(100_000) for _ in range(rng.randint(50, 1_500))]
        made.append((common + own if index % 2 else own, rng.randint(50, 250)))
    return made


def turns(number: int, sessions: int) -> list[tuple[list[int], int]]:
    """The prompts and output lengths of each session's turn of that number; a turn brings 200 to 2,000 tokens."""
    rng = random.Random(0)
    common = [rng.randrange(100_000) for _ in range(8_000)]
    made = []
    for session in range(sessions):
        rng = random.Random(session + 1)
        text = common + [rng.randrange(100_000) for _ in range(rng.randint(20_000, 30_000))]
        for _ in range(number):
            text += [rng.randrange(100_000) for _ in range(rng.randint(200, 2_000))]
        made.append((text, rng.randint(50, 150)))
    return made


def serve_round(engine: Any, made: Sequence[tuple[list[int], int]], seed: int, full: int) -> dict[str, Any]:
    """Serve one round of requests; seconds of every step that had at least so many requests running."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    for index, (prompt, output_tokens) in enumerate(made):
        add_request(engine, f"{seed}-{index}", prompt, output_tokens)
    seconds, steps, preempted = [], 0, 0
    while engine.scheduler.has_requests():
        step = take_step(engine)
        steps += 1
        preempted += len(step.output.preempted_req_ids or ())
        if len(step.output.num_scheduled_tokens) >= full:
            seconds.append(step.scheduler_seconds)
    return {"mean": mean(seconds), "median": median(seconds), "steps": steps, "full": len(seconds), "pre": preempted}


def child(args: argparse.Namespace, memory: int) -> None:
    """One side: an engine that serves a round for every line that it reads."""
    from tidepool.models import entry
    from tidepool.replay.engine import EngineShape, make_checked_engine
    from tidepool.vllm_plugin.served import NotServedError

    model, side, switch = args.child
    caching, agents, profile = switch == "1", args.workload == "agents", args.profile
    shape = EngineShape(
        entry(model).config,
        memory,
        side,
        max_num_seqs=args.running,
        max_model_len=131_072 if agents else 32_768,
        prefix_caching=caching,
        block_size=args.block_size,
    )
    try:
        engine = make_checked_engine(shape)
    except NotServedError as error:
        print(f"{MARK}{REFUSED}{error}", flush=True)
        return
    print(MARK + "ready", flush=True)
    profiler = None
    for line in sys.stdin:
        if profile and int(line):
            import cProfile

            profiler = profiler or cProfile.Profile()
            profiler.enable()
        seed = int(line)
        asked = turns(seed, args.sessions) if agents else requests(seed, args.running)
        made = serve_round(engine, asked, seed, 1 if agents else args.running)
        if profiler:
            profiler.disable()
            profiler.dump_stats(Path(profile or ".", f"{model}-{side}-{'on' if caching else 'off'}.prof"))
        print(MARK + json.dumps(made), flush=True)


class Side:
    """A child process."""

    def __init__(self, args: argparse.Namespace, model: str, side: str, caching: bool) -> None:
        command = [sys.executable, __file__, "--child", model, side, str(int(caching))]
        command += ["--running", str(args.running), "--memory", args.memory]
        command += ["--workload", args.workload, "--sessions", str(args.sessions), "--block-size", str(args.block_size)]
        command += ["--profile", args.profile] if args.profile else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT | os.environ,
        )
        self.receive()

    def receive(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK + REFUSED):
                raise SystemExit(line.removeprefix(MARK + REFUSED).strip())
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
        raise SystemExit(f"The engine stopped: {self.process.args!r}")

    def round(self, seed: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.receive()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace, model: str, caching: bool) -> dict[str, Any]:
    """Both sides in turns: a round to warm up, then ``--rounds`` more, the first side changing each time."""
    sides = {name: Side(args, model, name, caching) for name in SIDES}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(args.rounds + 1):
        for name in SIDES if number % 2 else SIDES[::-1]:
            made = sides[name].round(number)
            if number:
                rounds[name].append(made)
    for side in sides.values():
        side.close()
    result: dict[str, Any] = {"model": model, "prefix_caching": caching}
    for name in SIDES:
        result[f"{name}_mean_us"] = 1e6 * median(made["mean"] for made in rounds[name])
        result[f"{name}_median_us"] = 1e6 * median(made["median"] for made in rounds[name])
        result[f"{name}_full_steps"] = sum(made["full"] for made in rounds[name])
        result[f"{name}_preemptions"] = sum(made["pre"] for made in rounds[name])
    pairs = list(zip(rounds["elastic"], rounds["stock"], strict=True))
    result["ratio"] = median(ours["mean"] / stock["mean"] for ours, stock in pairs)
    result["ratio_of_medians"] = median(ours["median"] / stock["median"] for ours, stock in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--memory", default="16GiB")
    parser.add_argument("--workload", choices=("chats", "agents"), default="chats")
    parser.add_argument("--sessions", type=int, default=16, help="of agents")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in an attention block")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--profile", help="a directory for cProfile's figures; times are worth nothing then")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from tidepool.sizes import parse_size

    if args.child:
        child(args, parse_size(args.memory))
        return
    steps = "all steps" if args.workload == "agents" else f"steps with {args.running} requests running"
    print(f"Scheduler CPU per step, {steps}, us; median of {args.rounds} rounds each.")
    print(f"{'':<34} {'mean over steps':^26}   {'median step':^26}")
    print(f"{'model':<20} {'prefix cache':<13}" + 2 * f" {'stock':>8} {'tidepool':>9} {'ratio':>7}  ")
    results = []
    for model in MODELS:
        for caching in (True,) if args.workload == "agents" else (False, True):
            made = compare(args, model, caching)
            results.append(made)
            print(
                f"{model:<20} {'on' if caching else 'off':<13} {made['stock_mean_us']:>8.0f} "
                f"{made['elastic_mean_us']:>9.0f} {made['ratio']:>7.3f}   {made['stock_median_us']:>8.0f} "
                f"{made['elastic_median_us']:>9.0f} {made['ratio_of_medians']:>7.3f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
