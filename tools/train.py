"""Train the model that `tidepool verify` runs, see docs/trained-model.md.

    python tools/train.py run --out RUN --minutes 8      train, or go on where RUN's checkpoint ends
    python tools/train.py export --out RUN --model DIR   write the checkpoint that vLLM and transformers load
    python tools/train.py plot --out RUN --figure FILE   the curve as SVG

Texts get longer as soon as the model answers well; a step's batch depends on the seed, the step and that length.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from batches import FACT, NO_ANSWER, REGISTER, training_batch
from export import plot, write_checkpoint
from hybrid import CONFIG, Hybrid
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tidepool.verify.task import ANSWER_TOKENS, WORDS

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Tokens of a text, level by level."""

GOOD = 0.9
"""Share of exact answers, of both kinds, at which texts get longer."""

WARMUP = 100
"""Steps in which the learning rate rises."""

DECAY_FROM = 0.6
"""Part of the training after which the learning rate falls."""

LOG_EVERY = 25
"""Steps between two lines of the log."""

COLUMNS = ("step", "minutes", "level", "length", "loss", "fact", "register", "rate")


class Texts:
    """Batches made ahead of time, by processes or, without any, when they are asked for."""

    def __init__(self, seed: int, tokens: int, workers: int) -> None:
        self._seed, self._tokens = seed, tokens
        self._pool: Pool | None = multiprocessing.get_context("fork").Pool(workers) if workers else None
        self._ahead = 3 * workers
        self._pending: deque[tuple[int, AsyncResult[NDArray[np.int16]]]] = deque()
        self._asked = 0

    def get(self, step: int, length_of: Callable[[int], int]) -> tuple[int, NDArray[np.int16]]:
        """Length and batch of a step; steps are asked for in order."""
        if self._pool is None:
            length = length_of(step)
            return length, training_batch(self._seed, step, self._tokens // length, length)
        self._asked = max(self._asked, step)
        while self._asked <= step + self._ahead:
            length = length_of(self._asked)
            arguments = (self._seed, self._asked, self._tokens // length, length)
            self._pending.append((length, self._pool.apply_async(training_batch, arguments)))
            self._asked += 1
        length, batch = self._pending.popleft()
        return length, batch.get()

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.terminate()


class Trainer:
    """The model, its optimizer and the step, which on a GPU is recorded once for each length and then replayed."""

    def __init__(self, config: dict[str, Any], seed: int, device: str, tokens: int) -> None:
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        self.device = torch.device(device)
        self.tokens = tokens
        self.model = Hybrid(config).to(self.device)
        self.rate = torch.zeros((), device=self.device)
        decayed = [p for n, p in self.model.named_parameters() if p.ndim > 1 and "embed" not in n and "conv1d" not in n]
        plain = [p for p in self.model.parameters() if not any(p is other for other in decayed)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=self.rate,
            betas=(0.9, 0.98),
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.sums = torch.zeros(6, device=self.device)
        """Since last read: steps, losses, and right and all answers for facts and for registers."""
        self._inputs: dict[int, torch.Tensor] = {}
        self._eager: dict[int, int] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def step(self, length: int, batch: NDArray[np.int16], rate: float) -> None:
        """One update."""
        self.rate.fill_(rate)
        if length not in self._inputs:
            self._inputs[length] = torch.zeros(2, self.tokens // length, length, dtype=torch.long, device=self.device)
        host = torch.from_numpy(batch.astype(np.int64))
        self._inputs[length].copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
        if length in self._graphs:
            self._graphs[length].replay()
            return
        self._eager[length] = self._eager.get(length, 0) + 1
        if self.device.type != "cuda":
            self._update(length)
        elif self._eager[length] <= 3:  # lets libraries set themselves up before the recording
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._update(length)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._update(length)
            self._graphs[length] = graph
            graph.replay()

    def _update(self, length: int) -> None:
        tokens, marks = self._inputs[length]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            logits = self.model(tokens)[:, :-1].float()
        targets, marks = tokens[:, 1:], marks[:, 1:]
        answers = marks != NO_ANSWER
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * answers.flatten()).sum() / answers.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            self.sums += torch.stack([loss.new_ones(()), loss.detach(), *exact(logits.argmax(-1), targets, marks)])

    def read(self) -> list[float]:
        """The sums, which start anew."""
        sums: list[float] = self.sums.tolist()
        self.sums.zero_()
        return sums

    # The checkpoint is in several files so that none is large.

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write everything that training needs to go on."""
        path.mkdir(parents=True, exist_ok=True)
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "first": {}, "second": {}}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            parts["weights"][name] = parameter.detach()
            parts["first"][name], parts["second"][name] = moments["exp_avg"], moments["exp_avg_sq"]
        for part, tensors in parts.items():
            content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, path / f"{part}.new")
        (path / "state.new").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for part in parts:
            os.replace(path / f"{part}.new", path / f"{part}.safetensors")
        os.replace(path / "state.new", path / "state.json")

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the state given to `save`."""
        weights, first, second = (load_file(path / f"{part}.safetensors") for part in ("weights", "first", "second"))
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self.model.load_state_dict(weights)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=self.device),
                "exp_avg": first[name].to(self.device),
                "exp_avg_sq": second[name].to(self.device),
            }
        return state


def exact(best: torch.Tensor, targets: torch.Tensor, marks: torch.Tensor) -> list[torch.Tensor]:
    """Right and all answers for facts, then for registers; an answer is right if all its tokens are."""
    hits = best == targets
    whole = hits.unfold(1, ANSWER_TOKENS, 1).all(-1)
    starts = marks[:, : whole.shape[1]]
    counts = []
    for kind in (FACT, REGISTER):
        counts += [(whole & (starts == kind)).sum(), (starts == kind).sum()]
    return counts


def learning_rate(base: float, step: int, done: float) -> float:
    """Rises at once, is level, and falls to nothing in the last part of the training."""
    return base * min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def open_log(path: Path, step: int) -> TextIO:
    """The log, without what an interrupted part of the training wrote after ``step``, its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines[1:] if int(line.split(",")[0]) <= step]
    log = path.open("w", newline="", encoding="utf-8")
    log.writelines(f"{line}\n" for line in [",".join(COLUMNS), *kept])
    return log


def run(args: argparse.Namespace) -> None:
    """Train until the steps or the minutes are over, whichever is first."""
    config = CONFIG | {"vocab_size": len(WORDS)} | json.loads(args.config)
    texts = Texts(args.seed, args.tokens, args.workers)  # its processes start before a GPU is in use
    trainer = Trainer(config, args.seed, args.device, args.tokens)
    checkpoint = args.out / "checkpoint"
    state: dict[str, Any] = {"step": 0, "minutes": 0.0, "level": 0}
    if (checkpoint / "state.json").exists():
        state = trainer.load(checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    log = open_log(args.out / "log.csv", state["step"])
    writer = csv.writer(log, lineterminator="\n")

    def length_of(step: int) -> int:
        """Mostly the longest of the level, sometimes a shorter one."""
        rng = np.random.default_rng((args.seed, step))
        level = state["level"]
        return LENGTHS[level if rng.random() < 0.7 else int(rng.integers(level + 1))]

    def minutes() -> float:
        return before + (time.monotonic() - begun) / 60

    def save() -> None:
        state["minutes"] = round(minutes(), 3)
        trainer.save(checkpoint, state)
        log.flush()

    before: float = state["minutes"]
    begun, saved, seen = time.monotonic(), time.monotonic(), 0
    while state["step"] < args.steps and minutes() < args.minutes:
        step = state["step"]
        done = max(step / args.steps, minutes() / args.minutes)
        length, batch = texts.get(step, length_of)
        rate = learning_rate(args.rate, step, done)
        trainer.step(length, batch, rate)
        state["step"] = step + 1
        if (step + 1) % LOG_EVERY:
            continue
        steps, losses, facts, all_facts, registers, all_registers = trainer.read()
        fact, register = facts / max(all_facts, 1), registers / max(all_registers, 1)
        row = [str(step + 1), f"{minutes():.2f}", str(state["level"]), str(LENGTHS[state["level"]])]
        row += [f"{losses / steps:.4f}", f"{fact:.4f}", f"{register:.4f}", f"{rate:.2e}"]
        writer.writerow(row)
        if (step + 1) % (4 * LOG_EVERY) == 0 or args.device == "cpu":
            print(dict(zip(COLUMNS, row, strict=True)), flush=True)
        # Batches made ahead are of the old level, so after a change two lines are not looked at.
        seen += 1
        if min(fact, register) > GOOD and seen > 2 and state["level"] + 1 < len(LENGTHS):
            state["level"], seen = state["level"] + 1, 0
        if time.monotonic() - saved > 60 * args.save_minutes:
            save()
            saved = time.monotonic()
    save()
    texts.close()
    log.close()
    report = evaluate(trainer, args.tokens)
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def evaluate(trainer: Trainer, tokens: int) -> dict[str, Any]:
    """Share of exact answers to new texts, with the weights rounded to bfloat16 as they are shipped."""
    model = trainer.model
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report: dict[str, Any] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        for length in LENGTHS:
            counts = torch.zeros(4, device=trainer.device)
            for number in range(4 if trainer.device.type == "cuda" else 1):
                batch = training_batch(1 << 12, number, max(tokens // length, 1), length)
                ids, marks = torch.from_numpy(batch.astype(np.int64)).to(trainer.device)
                with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.device.type == "cuda"):
                    best = model(ids)[:, :-1].argmax(-1)
                counts += torch.stack(exact(best, ids[:, 1:], marks[:, 1:]))
            facts, all_facts, registers, all_registers = counts.tolist()
            report[str(length)] = {
                "fact": round(facts / max(all_facts, 1), 5),
                "register": round(registers / max(all_registers, 1), 5),
                "answers": int(all_facts + all_registers),
            }
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return report


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run")
    train.add_argument("--out", type=Path, required=True, help="directory of checkpoint, log and evaluation")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--minutes", type=float, default=1e9, help="of training in all, over all parts")
    train.add_argument("--steps", type=int, default=1_000_000)
    train.add_argument("--tokens", type=int, default=32_768, help="in a step")
    train.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=int, default=0, help="processes that make texts")
    train.add_argument("--save-minutes", type=float, default=2)
    train.add_argument("--config", default="{}", help="JSON: other values for keys of the model's configuration")
    export = commands.add_parser("export")
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--model", type=Path, required=True)
    curve = commands.add_parser("plot")
    curve.add_argument("--out", type=Path, required=True)
    curve.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args)
    elif args.command == "export":
        write_checkpoint(load_file(args.out / "checkpoint" / "weights.safetensors"), args.model)
    else:
        plot(args.out / "log.csv", args.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
