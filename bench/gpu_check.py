"""Stock vLLM and tidepool on one GPU: the same answers, how many requests at once, and how fast.

    python bench/gpu_check.py [--parts answers,start,speed] [--modes eager,graphs] [--backends FLASH_ATTN] [--json FILE]

Needs a GPU and ``pip install tidepool vllm``; no downloads. Every engine is a process of its own.

answers  Tiny checkpoints with random weights (`tidepool.testing.tiny`). "roomy": memory for all requests, so that both
         sides run the same batches. "tight": so little that requests are preempted. "shared": prefix caching, with
         prefixes that several requests share and more of them than memory holds. "again": prompts that come again.
start    The same engines as a user starts them: memory from ``gpu_memory_utilization``, CUDA graphs, the engine core in
         another process.
speed    The shape of a real model with dummy weights. All sides are started side by side and take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

FAMILIES = ("qwen3.5", "nemotron-h")
ARCHITECTURES = {"qwen3_5_text": "Qwen3_5ForCausalLM", "nemotron_h": "NemotronHForCausalLM"}
BFLOAT16_GAP = 1.0
"""Logits of the tiny models reach 64, where neighbouring bfloat16 numbers lie 0.25 apart; four such steps."""
ROOMY_BYTES = 400_000_000
TIGHT_BYTES = {"qwen3.5": 52_000_000, "nemotron-h": 48_000_000}
SHARED_BYTES = {"qwen3.5": 36_000_000, "nemotron-h": 56_000_000}
FIXED_SEQS = {"qwen3.5": 26, "nemotron-h": 16}
MARK = "gpu_check: "


@dataclass(frozen=True)
class Job:
    """One engine that answers one batch, perhaps twice."""

    name: str
    model: str
    side: str
    """stock, elastic or fixed."""
    mode: str
    """eager, graphs (CUDA graphs of decode steps) or compile (vLLM's default: torch.compile and CUDA graphs)."""
    runner: int
    backend: str
    kv_bytes: int | None
    """None: vLLM measures it."""
    max_num_seqs: int
    prefix_caching: bool
    requests: int
    own_lengths: tuple[int, ...]
    shared_lengths: tuple[int, ...]
    output_tokens: int
    rounds: int = 1
    poison: bool = False
    lose_copies: bool = False
    """Leave out the copies of states that prefix hits need: the check must notice."""


def answers_jobs(model: Path, family: str, mode: str, runner: int, backend: str) -> Iterator[Job]:
    """The jobs of the part "answers" for one model."""
    batch = Job(
        "roomy", str(model), "stock", mode, runner, backend, ROOMY_BYTES, 128, False, 72,
        (20, 40, 60, 150, 300, 620, 750), (), 40,
    )  # fmt: skip
    for side in ("stock", "elastic", "fixed"):
        yield replace(batch, side=side)
    tight = replace(batch, name="tight", kv_bytes=TIGHT_BYTES[family])
    yield tight
    yield replace(tight, side="elastic")
    yield replace(tight, side="elastic", poison=True)
    yield replace(tight, side="fixed", max_num_seqs=FIXED_SEQS[family])
    shared = Job(
        "shared", str(model), "stock", mode, runner, backend, SHARED_BYTES[family], 5, False, 30,
        (20, 60, 150, 400), (300, 500, 700), 16, rounds=2,
    )  # fmt: skip
    yield shared
    hits = replace(shared, prefix_caching=True)
    yield hits
    yield replace(hits, side="elastic")
    yield replace(hits, side="elastic", poison=True)
    yield replace(hits, side="fixed")
    # Enough memory to resume behind whole prompts, which takes a copy of the state there.
    again = replace(shared, name="again", kv_bytes=2 * SHARED_BYTES[family], requests=12)
    yield again
    for side in ("stock", "elastic", "fixed"):
        yield replace(again, prefix_caching=True, side=side)
    yield replace(again, prefix_caching=True, side="elastic", poison=True)
    yield replace(again, prefix_caching=True, side="elastic", poison=True, lose_copies=True)


def start_jobs(model: Path, runner: int, backend: str) -> Iterator[Job]:
    """The jobs of the part "start" for one model."""
    for side in ("stock", "elastic", "fixed"):
        yield Job(
            "start", str(model), side, "compile", runner, backend, None, 64, True, 48, (20, 60, 300, 700), (500,), 16
        )


def prompts(job: Job) -> list[list[int]]:
    """The same for every side."""
    rng = random.Random(3)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    shared = [some(length) for length in job.shared_lengths]
    return [(rng.choice(shared) if shared else []) + some(rng.choice(job.own_lengths)) for _ in range(job.requests)]


def engine_arguments(mode: str, backend: str) -> dict[str, Any]:
    """vLLM's arguments for a mode and an attention backend."""
    arguments: dict[str, Any] = {} if backend == "auto" else {"attention_backend": backend}
    if find_spec("flashinfer") is None:
        arguments["gdn_prefill_backend"] = "triton"
    if mode == "eager":
        return arguments | {"enforce_eager": True}
    sizes = [1, 2, 4, 8, *range(16, 257, 16)]
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": sizes}
    if mode == "graphs":
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments | {"compilation_config": graphs}


def environment(side: str, runner: int, poison: bool, processes: bool) -> dict[str, str]:
    """The environment of an engine's process. Switches of the user's own win."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Kernels that are tuned when first run would round differently from process to process.
        "TRITON_CACHE_AUTOTUNING": "1",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "TIDEPOOL": "off" if side == "stock" else side.partition("-")[0],
        "TIDEPOOL_POISON": "1" if poison else "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes else "0",
    }


# Answers, in the child ----------------------------------------------------------------------------------------


def answer() -> None:
    """Run one job, read from standard input."""
    given = json.load(sys.stdin)
    job = Job(**given | {key: tuple(given[key]) for key in ("own_lengths", "shared_lengths")})
    from vllm import LLM, SamplingParams

    if job.lose_copies:
        from tidepool.vllm_plugin.worker import ArenaBytes

        ArenaBytes.copy = lambda self, copies: None  # type: ignore[method-assign]
    memory: dict[str, Any] = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": job.kv_bytes}
    if job.kv_bytes is None:
        memory = {"gpu_memory_utilization": 0.12}
    llm = LLM(
        model=job.model,
        max_model_len=2048,
        max_num_seqs=job.max_num_seqs,
        # Prompts are never cut, so that every side computes the same chunks.
        max_num_batched_tokens=65_536 if job.kv_bytes else 8_192,
        enable_prefix_caching=job.prefix_caching,
        additional_config={"tidepool": {"allow": ["device"]}},
        seed=0,
        disable_log_stats=False,
        **memory,
        **engine_arguments(job.mode, job.backend),
    )
    sampling = SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True, logprobs=20)
    answers, cached, began = [], 0, time.perf_counter()
    for _ in range(job.rounds):
        for output in llm.generate([{"prompt_token_ids": p} for p in prompts(job)], sampling, use_tqdm=False):
            completion = output.outputs[0]
            cached += output.num_cached_tokens or 0
            logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs or ()]
            answers.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    result: dict[str, Any] = {
        "answers": answers,
        "seconds": time.perf_counter() - began,
        "cached_tokens": cached,
        "preemptions": next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
    }
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        manager = core.scheduler.kv_cache_manager
        arena = getattr(manager.block_pool, "arena", None)
        config = core.vllm_config
        result |= {
            "moves": arena.moves if arena else 0,
            "leaked": arena.usage().in_use if arena else 0,
            "runner": 1 + config.use_v2_model_runner,
            "async": bool(config.scheduler_config.async_scheduling),
            "graphs": str(config.compilation_config.cudagraph_mode),
            "layout": config.cache_config.kv_cache_layout,
            "backends": sorted(attention_backends(config)),
            "attention_block": config.cache_config.block_size,
        }
    print(MARK + json.dumps(result), flush=True)


def attention_backends(config: Any) -> set[str]:
    """Names of the backends of all layers."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = config.compilation_config.static_forward_context.values()
    return {layer.get_attn_backend().get_name() for layer in layers if isinstance(layer, AttentionLayerBase)}


# Answers, in the parent ---------------------------------------------------------------------------------------


def run_job(job: Job, logs: Path) -> dict[str, Any]:
    """Run a job in a process of its own; on failure the result says why."""
    name = f"{Path(job.model).name}-{job.mode}-v{job.runner}-{job.backend}-{job.name}-{job.side}"
    name += "-caching" * job.prefix_caching + "-poison" * job.poison + "-lossy" * job.lose_copies
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, __file__, "--child", "answer"],
        input=json.dumps(asdict(job)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(job.side, job.runner, job.poison, processes=job.kv_bytes is None),
        timeout=540,
    )
    (logs / f"{name}.log").write_text(process.stdout, encoding="utf-8")
    line = next((line for line in process.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        reasons = [line for line in process.stdout.splitlines() if "Error" in line]
        return {"log": name, "failed": (reasons or process.stdout.splitlines() or [""])[-1][-300:]}
    served = "tidepool serves this model" in process.stdout
    if served != (job.side != "stock"):
        lines = process.stdout.splitlines()
        aside = next(
            (line[line.index("tidepool falls back") :] for line in lines if "tidepool falls back" in line), None
        )
        return {"log": name, "failed": aside or "tidepool's plugin isn't loaded"}
    made: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return made | {"log": name, "wall": time.perf_counter() - began}


def compared(reference: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """How answers differ.

    ``gaps``: for each answer that differs, by how much the reference prefers its own token where they first do
    (log-probabilities; infinite if the other token isn't among its best 20). ``logprob_distance``: the most that
    the log-probability of a token differs, up to there.
    """
    gaps: list[float] = []
    distance = 0.0
    for expected, got in zip(reference["answers"], result["answers"], strict=True):
        pairs = zip(expected["tokens"], got["tokens"], expected["logprobs"], got["logprobs"], strict=True)
        for ours, theirs, before, after in pairs:
            if ours != theirs:
                gaps.append(before[str(ours)] - before.get(str(theirs), float("-inf")))
                break
            distance = max(distance, abs(before[str(ours)] - after[str(ours)]))
    answers = len(reference["answers"])
    return {"answers": answers, "equal": answers - len(gaps), "gaps": gaps, "logprob_distance": distance}


def check_answers(results: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every job with its reference: stock vLLM without prefix caching, or the same job without poison."""
    rows = []
    for job, result in results.items():
        row = {key: value for key, value in asdict(job).items() if key in ("name", "side", "mode", "runner", "backend")}
        row |= {"model": Path(job.model).name, "prefix_caching": job.prefix_caching, "poison": job.poison}
        row |= {"lossy": job.lose_copies} | {key: value for key, value in result.items() if key != "answers"}
        plain = replace(job, side="stock", poison=False, lose_copies=False, prefix_caching=job.kv_bytes is None)
        plain = replace(
            plain, max_num_seqs=5 if job.name in ("shared", "again") else 64 if job.name == "start" else 128
        )
        references = {"stock": plain}
        if job.poison and not job.lose_copies:
            references["unpoisoned"] = replace(job, poison=False)
        for name, reference in references.items():
            if "failed" not in result and "failed" not in results.get(reference, {"failed": ""}):
                row[f"to_{name}"] = compared(results[reference], result)
        rows.append(row)
    return rows


def print_answers(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each job."""
    print(f"{'':<58} {'preempted':>9} {'hits':>7} {'moves':>5}  answers equal to stock's")
    for row in rows:
        what = f"{row['model']} {row['mode']} runner {row['runner']} {row['backend']} {row['name']} {row['side']}"
        what += " caching" * row["prefix_caching"] + " poison" * row["poison"] + " lossy" * row["lossy"]
        if "failed" in row:
            print(f"{what:<58} FAILED: {row['failed']}")
            continue
        verdict = ""
        for name in ("stock", "unpoisoned"):
            if made := row.get(f"to_{name}"):
                verdict += f" {made['equal']}/{made['answers']} {'' if name == 'stock' else name}"
                over = sum(gap > BFLOAT16_GAP for gap in made["gaps"])
                verdict += f" worst gap {max(made['gaps'], default=0):.2f}" if made["gaps"] else ""
                verdict += f" OVER {over}" if over else ""
                verdict += f" logprobs within {made['logprob_distance']:.3f};"
        print(f"{what:<58} {row['preemptions']:>9.0f} {row['cached_tokens']:>7} {row.get('moves', 0):>5} {verdict}")


# Speed --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Requests that are all there from the start."""

    name: str
    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


LOADS = (
    Load("mixed", 192, (50, 1500), (64, 128)),
    Load("decode, 64 requests of 512 tokens", 64, (512, 512), (64, 64)),
    Load("decode, 16 requests of 8,000 tokens", 16, (8000, 8000), (64, 64)),
)


def speed(model: str, side: str, memory: int, mode: str, runner: int, backend: str) -> None:
    """One side: an engine that runs a load for every line that it reads."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tidepool: dict[str, Any] = {"allow": ["device"]}
    if block := side.partition("-")[2]:
        tidepool["block_tokens"] = int(block)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=16_384,
            max_num_seqs=256,
            max_num_batched_tokens=8_192,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=memory,
            gpu_memory_utilization=0.1,
            additional_config={"tidepool": tidepool},
            disable_log_stats=True,
            **engine_arguments(mode, backend),
        )
    )
    scheduler = engine.engine_core.engine_core.scheduler
    print(MARK + "ready", flush=True)
    for line in sys.stdin:
        load = Load(**json.loads(line))
        rng = random.Random(load.name)
        for index in range(load.requests):
            tokens = [rng.randrange(1000, 100_000) for _ in range(rng.randint(*load.prompt))]
            sampling = SamplingParams(
                temperature=0,
                max_tokens=rng.randint(*load.answer),
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": tokens}, sampling)
        steps: list[float] = []
        peak = answered = running_sum = count = 0
        preempted: dict[str, int] = {}
        began = last = time.perf_counter()
        while engine.has_unfinished_requests():
            finished = engine.step()
            now = time.perf_counter()
            running = len(scheduler.running)
            peak, running_sum, count = max(peak, running), running_sum + running, count + 1
            if running == load.requests and all(not r.is_prefill_chunk for r in scheduler.running):
                steps.append(now - last)
            last = now
            preempted |= {r.request_id: r.num_preemptions for r in scheduler.requests.values() if r.num_preemptions}
            answered += sum(len(output.outputs[0].token_ids) for output in finished)
        seconds = time.perf_counter() - began
        made = {
            "seconds": seconds,
            "tokens_per_second": answered / seconds,
            "peak": peak,
            "mean_running": running_sum / count,
            "preemptions": sum(preempted.values()),
            "decode_step_ms": 1e3 * median(steps) if len(steps) > 20 else None,
        }
        print(MARK + json.dumps(made), flush=True)


class Side:
    """A child process with an engine."""

    def __init__(self, model: Path, side: str, args: argparse.Namespace, mode: str, backend: str, logs: Path) -> None:
        self.side = side
        self.log = (logs / f"speed-{side}-{mode}-{backend}.log").open("w", buffering=1, encoding="utf-8")
        command = [sys.executable, __file__, "--child", "speed"]
        command += [str(model), side, str(args.memory), mode, str(args.runners[0]), backend]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(side, args.runners[0], poison=False, processes=False),
        )

    def receive(self) -> str:
        """The next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK).strip()
            self.log.write(line)
        raise SystemExit(f"The engine of {self.side} stopped; its log is {self.log.name}.")

    def run(self, load: Load) -> dict[str, Any]:
        """Run a load."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(load)) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.receive()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def measure_speed(args: argparse.Namespace, directory: Path, logs: Path, mode: str, backend: str) -> dict[str, Any]:
    """All sides on all loads in turns: one round to warm up, then ``--rounds`` more."""
    from tidepool.models import entry

    model = directory / args.model
    model.mkdir(exist_ok=True)
    config = dict(entry(args.model).config)
    config |= {"architectures": [ARCHITECTURES[config["model_type"]]], "dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sides = [Side(model, side, args, mode, backend, logs) for side in args.sides]
    for each in sides:
        each.receive()
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {load.name: {} for load in LOADS}
    for number in range(args.rounds + 1):
        for load in LOADS:
            for each in sides if number % 2 else sides[::-1]:
                made = each.run(load)
                print(f"round {number} {load.name}, {each.side}: {json.dumps(made)}", file=sys.stderr, flush=True)
                if number:
                    rounds[load.name].setdefault(each.side, []).append(made)
    for each in sides:
        each.close()
    return {"model": args.model, "memory": args.memory, "mode": mode, "backend": backend, "rounds": rounds}


def print_speed(made: dict[str, Any]) -> None:
    """A line for each load and side; ratios are medians over the rounds, each to stock in the same round."""
    print(f"\n{made['model']}, dummy weights, {made['memory']:,} bytes, {made['mode']}, {made['backend']}")
    print(f"{'':<52} {'at once':>8} {'preempted':>9} {'tok/s':>8} {'ratio':>6} {'decode step ms':>15} {'ratio':>6}")
    for load, sides in made["rounds"].items():
        stock = sides.get("stock")
        for side, rounds in sides.items():
            first = rounds[0]
            line = f"{load:<38} {side:<13} {first['peak']:>8} {first['preemptions']:>9}"
            for key, width, more in (("tokens_per_second", 8, True), ("decode_step_ms", 15, False)):
                values = [each[key] for each in rounds]
                if None in values:
                    continue
                line += f" {median(values):>{width}.{0 if more else 2}f}"
                if stock:
                    ratio = median(a / b[key] for a, b in zip(values, stock, strict=True))
                    line += f" {ratio:>6.3f}"
            print(line)


# Command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse the command line and run the parts."""
    if sys.argv[1:3] == ["--child", "answer"]:
        answer()
        return
    if sys.argv[1:3] == ["--child", "speed"]:
        path, side, memory, mode, run_by, backend = sys.argv[3:]
        speed(path, side, int(memory), mode, int(run_by), backend)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--parts", type=words, default=["answers", "start", "speed"])
    parser.add_argument("--modes", type=words, default=["eager", "compile"], help="of answers; speed takes the last")
    parser.add_argument("--backends", type=words, default=["auto"], help="attention backends, or auto")
    parser.add_argument("--runners", type=lambda text: [int(word) for word in text.split(",")], default=[2])
    parser.add_argument("--jobs", type=int, default=4, help="engines at once in answers and start")
    parser.add_argument("--only", default="", help="of answers, only these workloads: roomy,tight,shared,again")
    parser.add_argument("--model", default="Qwen3.5-4B", help="shape for speed")
    parser.add_argument("--memory", type=int, default=8 << 30, help="bytes of KV memory for speed")
    parser.add_argument("--sides", type=words, default=["stock", "elastic"], help="elastic-64: blocks of 64 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", type=Path, help="keep the engines' logs there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    args = parser.parse_args()

    import torch

    from tidepool.testing.tiny import make_checkpoint

    with TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        directory = Path(temporary)
        logs = args.logs or directory
        logs.mkdir(parents=True, exist_ok=True)
        models = {family: make_checkpoint(family, directory / family) for family in FAMILIES}  # type: ignore[arg-type]
        report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(f"{report['gpu']}, torch {report['torch']}", flush=True)
        jobs: list[Job] = []
        for runner in args.runners:
            for backend in args.backends:
                for family, model in models.items():
                    if "answers" in args.parts:
                        for mode in args.modes:
                            jobs += answers_jobs(model, family, mode, runner, backend)
                    if "start" in args.parts:
                        jobs += start_jobs(model, runner, backend)
        jobs = [job for job in jobs if not args.only or job.name in (*args.only.split(","), "start")]
        # The first of each kind tunes the kernels for those that follow.
        first = list({(job.model, job.backend): job for job in jobs[::-1]}.values())
        results = dict(zip(first, pool.map(lambda job: run_job(job, logs), first), strict=True))
        rest = [job for job in jobs if job not in results]
        results |= dict(zip(rest, pool.map(lambda job: run_job(job, logs), rest), strict=True))
        report["answers"] = check_answers({job: results[job] for job in jobs})
        print_answers(report["answers"])
        sys.stdout.flush()
        if "speed" in args.parts:
            report["speed"] = []
            for backend in args.backends:
                report["speed"].append(measure_speed(args, directory, logs, args.modes[-1], backend))
                print_speed(report["speed"][-1])
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
