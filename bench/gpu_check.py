"""Stock vLLM and tidepool on one GPU: the same answers, how many requests at once, and how fast.

    python bench/gpu_check.py [--parts answers,start,speed] [--modes eager,graphs] [--backends FLASH_ATTN] [--json FILE]

Needs a GPU and ``pip install tidepool vllm``; no downloads. Every engine is a process of its own.

answers  Tiny checkpoints with random weights (`tidepool.testing.tiny`). "roomy": memory for all requests, so that both
         sides run the same batches. "tight": so little that requests are preempted. "shared": prefix caching, with
         prefixes that several requests share and more of them than memory holds. "again": prompts that come again.
start    The same engines as a user starts them: memory from ``gpu_memory_utilization``, CUDA graphs, the engine core in
         another process.
speed    The shapes of real models with dummy weights. All sides of a model are started side by side and take turns.
         For each load: output tokens a second, inter-token latency (ITL: the times between successive tokens of one
         request, over all requests), time to first token (TTFT, which includes the wait for memory) and the decode step
         (steps in which every request decodes). Medians; of TTFT also the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
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
SPEED_MEMORY = {"Qwen3.5-0.8B": 3 << 30}
"""Bytes of KV memory, 8 GiB where a model isn't named: so little that stock vLLM has requests of "mixed" wait. By
`tidepool plan` it holds 96, 99 and 76 of its 128 at their mean of 871 tokens (Qwen3.5-0.8B, 4B, Nemotron-3-Nano-4B)."""
SPEED_FIXED_SEQS = {"Nemotron-3-Nano-4B": 80}
"""max_num_seqs of the fixed partition in that memory, 100 where a model isn't named: about as many such requests have
room for their tokens beside the states. The other sides have 256."""


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
        arena = getattr(core.scheduler.kv_cache_manager.block_pool, "arena", None)
        result |= {"moves": arena.moves if arena else 0, "leaked": arena.usage().in_use if arena else 0}
        result |= how_it_runs(core.vllm_config)
    print(MARK + json.dumps(result), flush=True)


def how_it_runs(config: Any) -> dict[str, Any]:
    """What vLLM chose."""
    return {
        "runner": 1 + config.use_v2_model_runner,
        "async": bool(config.scheduler_config.async_scheduling),
        "graphs": str(config.compilation_config.cudagraph_mode),
        "layout": config.cache_config.kv_cache_layout,
        "backends": sorted(attention_backends(config)),
        "attention_block": config.cache_config.block_size,
    }


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
        return {"log": name, "failed": last_error(process.stdout)}
    served = "tidepool serves this model" in process.stdout
    if served != (job.side != "stock"):
        return {"log": name, "failed": why_not_served(process.stdout)}
    made: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return made | {"log": name, "wall": time.perf_counter() - began}


def last_error(log: str) -> str:
    """The lines of a log that tell best why its engine stopped."""
    lines = log.splitlines()
    last = max((number for number, line in enumerate(lines) if "Error" in line), default=-1)
    return " ".join(lines[last:])[:300]


def why_not_served(log: str) -> str:
    """Why tidepool left a model to vLLM."""
    reasons = (line[line.index("tidepool falls back") :] for line in log.splitlines() if "tidepool falls back" in line)
    return next(reasons, "tidepool's plugin isn't loaded")


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
    """Requests that are all there from the start; prompts and answers have lengths in tokens from one to another."""

    name: str
    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


LOADS = (
    Load("single", 1, (512, 512), (128, 128)),
    Load("decode-64", 64, (512, 512), (64, 64)),
    Load("decode-8k", 8, (8000, 8000), (48, 48)),
    Load("mixed", 128, (50, 1500), (64, 128)),
)
"""In "mixed" memory is short, and what counts is throughput; a step there has the more requests, the more fit."""
FEWEST_STEPS = 20


class Watch:
    """When the tokens of one load came, and how long its steps took; all times in seconds on one clock."""

    def __init__(self, began: float) -> None:
        self.began = self.last = began
        self.tokens: dict[str, list[float]] = {}
        """Of each request, when its tokens came."""
        self.running: list[int] = []
        """Of each step, how many requests were in it."""
        self.decode_steps: list[float] = []

    def step(self, now: float, scheduled: Mapping[str, int], made: Mapping[str, int]) -> None:
        """A step is over: how many tokens of each request it computed, and how many new ones came of it."""
        for request, count in made.items():
            self.tokens.setdefault(request, []).extend([now] * count)
        # A prompt's chunk computes more tokens than come of it. A step that was under way at the end of the load
        # before, with async scheduling, makes no token of this load.
        if sum(scheduled.values()) == len(scheduled) == sum(made.values()):
            self.decode_steps.append(now - self.last)
        self.running.append(len(scheduled))
        self.last = now

    def figures(self) -> dict[str, Any]:
        """Of the whole load; ``decode_step_ms`` is None where hardly any step only decodes."""
        first = [times[0] - self.began for times in self.tokens.values()]
        between = [later - earlier for times in self.tokens.values() for earlier, later in pairwise(times)]
        seconds = self.last - self.began
        tokens = sum(len(times) for times in self.tokens.values())
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "itl_ms": 1e3 * median(between),
            "ttft_ms": 1e3 * median(first),
            "mean_ttft_ms": 1e3 * fmean(first),
            "decode_step_ms": 1e3 * median(self.decode_steps) if len(self.decode_steps) > FEWEST_STEPS else None,
            "peak": max(self.running),
            "mean_running": fmean(self.running),
        }


def speed(model: str, side: str, memory: int, max_num_seqs: int, mode: str, backend: str) -> None:
    """One side: an engine that runs a load for every line that it reads, and answers with a line."""
    # What vLLM prints goes to the log: in the pipe it would stop an engine whose lines no one reads.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
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
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=8_192,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=memory,
            gpu_memory_utilization=0.1,
            additional_config={"tidepool": tidepool},
            disable_log_stats=True,
            **engine_arguments(mode, backend),
        )
    )
    core: Any = engine.engine_core.engine_core
    scheduler = core.scheduler
    update = scheduler.update_from_output
    watch = Watch(time.perf_counter())

    def watched(scheduled: Any, result: Any) -> Any:
        # Here the engine core turns the result of a step into tokens: the step that is over, also with async
        # scheduling, when the scheduler is a step ahead. To see tokens outside, in outputs of the kind DELTA, costs
        # an object for each, on the thread that drives the GPU.
        outputs = update(scheduled, result)
        made = {each.request_id: len(each.new_token_ids) for some in outputs.values() for each in some.outputs}
        watch.step(time.perf_counter(), scheduled.num_scheduled_tokens, made)
        return outputs

    scheduler.update_from_output = watched

    def say(what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=pipe, flush=True)

    served = getattr(scheduler.kv_cache_manager.block_pool, "arena", None) is not None
    say({"served": served, **how_it_runs(core.vllm_config)})
    for number, line in enumerate(sys.stdin):
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
            engine.add_request(f"{number}-{index}", {"prompt_token_ids": tokens}, sampling)
        requests = list(scheduler.requests.values())
        watch = Watch(time.perf_counter())
        while engine.has_unfinished_requests():
            engine.step()
        say(watch.figures() | {"preemptions": sum(request.num_preemptions for request in requests)})


class Side:
    """A child process with an engine. One that fails is left out from then on."""

    def __init__(self, model: Path, side: str, args: argparse.Namespace, mode: str, backend: str, logs: Path) -> None:
        self.side = side
        self.failed = ""
        """Why, once it has."""
        self.log = logs / f"speed-{model.name}-{side}-{mode}-{backend}.log"
        memory = args.memory or speed_memory(model.name)
        fixed_seqs = SPEED_FIXED_SEQS.get(model.name, 100) * memory // speed_memory(model.name)
        command = [sys.executable, __file__, "--child", "speed", str(model), side, str(memory)]
        command += [str(fixed_seqs if side.startswith("fixed") else 256), mode, backend]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(side, args.runners[0], poison=False, processes=False),
            )

    def fail(self, why: Callable[[str], str]) -> None:
        """Note what the log says."""
        self.failed = why(self.log.read_text(encoding="utf-8", errors="replace"))
        print(f"{self.side} FAILED: {self.failed} (log: {self.log})", flush=True)

    def receive(self) -> dict[str, Any] | None:
        """The next answer; None if there is none."""
        assert self.process.stdout is not None
        line = "" if self.failed else self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        if not self.failed:
            self.fail(last_error)
        return None

    def started(self) -> dict[str, Any] | None:
        """How its engine runs, once it does; None if it doesn't, or if tidepool leaves the model to vLLM."""
        how = self.receive()
        if how and how["served"] != (self.side != "stock"):
            self.fail(why_not_served)
        return how

    def run(self, load: Load) -> dict[str, Any] | None:
        """The figures of a load; None if the engine failed."""
        assert self.process.stdin is not None
        if not self.failed:
            with suppress(BrokenPipeError):  # `receive` says why.
                self.process.stdin.write(json.dumps(asdict(load)) + "\n")
                self.process.stdin.flush()
        return self.receive()

    def close(self) -> None:
        """End the process; its memory is free afterwards."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def loads(text: str) -> tuple[Load, ...]:
    """The loads whose names begin with one of these words.

    Raises:
        argparse.ArgumentTypeError: a word chooses none.
    """
    asked = text.split(",")
    for word in asked:
        if not any(load.name.startswith(word) for load in LOADS):
            raise argparse.ArgumentTypeError(f"no load is named {word!r}: {', '.join(load.name for load in LOADS)}")
    return tuple(load for load in LOADS if load.name.startswith(tuple(asked)))


def measure_speed(
    args: argparse.Namespace, directory: Path, logs: Path, mode: str, backend: str
) -> Iterator[dict[str, Any]]:
    """The figures of each model, as soon as they are there."""
    for first in range(0, len(args.model), args.together):
        sides: dict[str, list[Side]] = {}
        for name in args.model[first : first + args.together]:
            model = write_config(name, directory)
            sides[name] = [Side(model, side, args, mode, backend, logs) for side in args.sides]
        # An engine that still starts would slow one that is measured.
        engines = {name: {each.side: each.started() for each in some} for name, some in sides.items()}
        for name, some in sides.items():
            rounds = take_turns(some, args.loads, args.rounds, args.seconds)
            for each in some:
                each.close()
            yield {
                "model": name,
                "memory": args.memory or speed_memory(name),
                "mode": mode,
                "backend": backend,
                "engines": engines[name],
                "failed": {each.side: each.failed for each in some if each.failed},
                "rounds": rounds,
            }


def speed_memory(name: str) -> int:
    """Bytes of KV memory where the command line names none."""
    return SPEED_MEMORY.get(name, 8 << 30)


def write_config(name: str, directory: Path) -> Path:
    """A model directory with the shape alone."""
    from tidepool.models import entry

    model = directory / name
    model.mkdir(exist_ok=True)
    config = dict(entry(name).config)
    config |= {"architectures": [ARCHITECTURES[config["model_type"]]], "dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def take_turns(
    sides: Sequence[Side], chosen: Sequence[Load], rounds: int, seconds: float | None
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Figures of each load and side, one for each round.

    The first round warms up and isn't kept. Sides take turns in alternating order. Once ``seconds`` have passed there
    is no further round, but one is always kept.
    """
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {load.name: {} for load in chosen}
    began = time.perf_counter()
    for number in range(rounds + 1):
        for load in chosen:
            for each in sides if number % 2 else sides[::-1]:
                made = each.run(load)
                print(f"round {number} {load.name}, {each.side}: {json.dumps(made)}", file=sys.stderr, flush=True)
                if number and made:
                    figures[load.name].setdefault(each.side, []).append(made)
        if number and seconds is not None and time.perf_counter() - began > seconds:
            break
    return figures


COLUMNS = (
    ("tokens_per_second", "tok/s", 0),
    ("itl_ms", "ITL ms", 2),
    ("ttft_ms", "TTFT ms", 1),
    ("mean_ttft_ms", "mean TTFT", 1),
    ("decode_step_ms", "decode ms", 2),
)
"""Key of a figure, heading, digits behind the point."""


def print_speed(made: dict[str, Any]) -> None:
    """A line for each load and side; ratios are medians over the rounds, each to stock in the same round."""
    print(f"\n{made['model']}, dummy weights, {made['memory']:,} bytes, {made['mode']}, {made['backend']}")
    for side, how in made["engines"].items():
        print(f"  {side}: {made['failed'].get(side) or json.dumps(how)}")
    headings = "".join(f" {heading:>9} {'ratio':>6}" for _, heading, _ in COLUMNS)
    print(f"{'load':<10} {'side':<11} {'rounds':>6} {'at once':>7} {'preempted':>9}{headings}")
    for load, sides in made["rounds"].items():
        for side, rounds in sides.items():
            first = rounds[0]
            line = f"{load:<10} {side:<11} {len(rounds):>6} {first['peak']:>7} {first['preemptions']:>9}"
            for key, _, digits in COLUMNS:
                value, ratio = middle(rounds, sides.get("stock", ()), key)
                line += f" {'' if value is None else format(value, f'.{digits}f'):>9}"
                line += f" {'' if ratio is None else format(ratio, '.3f'):>6}"
            print(line)


def middle(
    rounds: Sequence[Mapping[str, Any]], stock: Sequence[Mapping[str, Any]], key: str
) -> tuple[float | None, float | None]:
    """The median of a figure, and the median of its ratios to stock; None where rounds lack it."""
    values = [each[key] for each in rounds if each[key] is not None]
    # A side that failed in a later round has fewer.
    pairs = [(a[key], b[key]) for a, b in zip(rounds, stock, strict=False)]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    return median(values) if values else None, median(ratios) if ratios else None


# Command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse the command line and run the parts."""
    if sys.argv[1:3] == ["--child", "answer"]:
        answer()
        return
    if sys.argv[1:3] == ["--child", "speed"]:
        path, side, memory, max_num_seqs, mode, backend = sys.argv[3:]
        speed(path, side, int(memory), int(max_num_seqs), mode, backend)
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
    parser.add_argument(
        "--model",
        type=words,
        default=["Qwen3.5-0.8B", "Qwen3.5-4B", "Nemotron-3-Nano-4B"],
        help="shapes for speed, measured one after another",
    )
    parser.add_argument("--together", type=int, default=1, help="models of speed whose engines start side by side")
    parser.add_argument("--memory", type=int, help="bytes of KV memory for speed; by default set for each model")
    parser.add_argument(
        "--sides", type=words, default=["stock", "elastic"], help="also fixed; elastic-64: blocks of 64 tokens"
    )
    parser.add_argument(
        "--loads",
        type=loads,
        default=LOADS,
        help=f"of speed, by how their names begin: {','.join(load.name for load in LOADS)}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of speed, after one to warm up")
    parser.add_argument(
        "--seconds", type=float, help="of speed, for each model: no further round once they have passed"
    )
    parser.add_argument("--logs", type=Path, help="keep the engines' logs there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    args = parser.parse_args()

    import torch

    from tidepool.testing.tiny import make_checkpoint

    with TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        directory = Path(temporary)
        logs = args.logs or directory
        logs.mkdir(parents=True, exist_ok=True)
        families = FAMILIES if {"answers", "start"} & set(args.parts) else ()
        models = {family: make_checkpoint(family, directory / family) for family in families}  # type: ignore[arg-type]
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

        def keep() -> None:
            sys.stdout.flush()
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

        if jobs:
            report["answers"] = check_answers({job: results[job] for job in jobs})
            print_answers(report["answers"])
            keep()
        if "speed" in args.parts:
            report["speed"] = []
            for backend in args.backends:
                # Figures are printed and kept model by model: a run that is cut short has those that are done.
                for made in measure_speed(args, directory, logs, args.modes[-1], backend):
                    report["speed"].append(made)
                    print_speed(made)
                    keep()


if __name__ == "__main__":
    main()
