"""The replay itself: requests arrive by a virtual clock, and every step moves it on."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from vllm.v1.engine.core import EngineCore

from tidepool.gpus import find_gpu
from tidepool.replay.bound import attention_only
from tidepool.replay.clock import CostModel, Work, cost_model
from tidepool.replay.drafts import Drafts
from tidepool.replay.engine import EngineShape, add_request, make_checked_engine, typed_layers
from tidepool.replay.job import HostFigures, Job, Result, Sample
from tidepool.replay.link import Link
from tidepool.replay.memory_use import MemoryMeter
from tidepool.replay.model import without_weights
from tidepool.replay.sampling import Sampler
from tidepool.replay.statistics import median, spread
from tidepool.replay.step import Step, take_step
from tidepool.replay.trace import TraceRequest
from tidepool.vllm_plugin.host_connector import HostConnector

PATIENCE = 100
"""Steps in a row that schedule nothing, after which a replay is given up."""


class ReplayError(RuntimeError):
    """A replay that can't go on; the message is one sentence for the user."""


class Replay:
    """One engine, one workload, one clock."""

    def __init__(self, engine: EngineCore, costs: CostModel, requests: Sequence[TraceRequest], rate: float) -> None:
        self.engine = engine
        self.costs = costs
        self.requests = requests
        self.rate = rate
        self.now = 0.0
        """Seconds of virtual time."""
        self.arrived = 0
        self.first_token: dict[str, float] = {}
        """Time from a request's arrival to its first token, in seconds, by its id."""
        self.last_token: dict[str, float] = {}
        """Likewise to its last token so far."""
        self.seen: set[str] = set()
        """Requests that have been scheduled."""
        self.hit_tokens = self.external_tokens = self.prompt_tokens = 0
        """Of requests when they were first scheduled: in the prefix cache, of these loaded by stock vLLM, and all."""
        self.preemptions = 0
        self.running_peak = 0
        self.running_seconds = 0.0
        """Integral of the running requests over virtual time."""
        self.scheduler_seconds = array("d")

    def run(self, sampler: Sampler, progress: Callable[[int], None]) -> None:
        """Serve everything.

        Args:
            sampler: asked after every step whether it is time for a look.
            progress: called after every look with the number of finished requests.

        Raises:
            ReplayError: requests are left that the scheduler doesn't schedule.
        """
        scheduler = self.engine.scheduler
        idle_steps = 0
        while True:
            self._let_arrive()
            if not scheduler.has_unfinished_requests():
                if self.arrived == len(self.requests):
                    break
                self.now = self.arrival(self.arrived)
                continue
            step = take_step(self.engine)
            self._account(step)
            idle_steps = 0 if step.output.total_num_scheduled_tokens or self._wait_for_link() else idle_steps + 1
            if idle_steps > PATIENCE:
                raise ReplayError(
                    f"{len(scheduler.running)} running and {len(scheduler.waiting)} waiting requests are left that the "
                    "scheduler doesn't schedule: the memory is too small for them."
                )
            if sampler.offer(self.now):
                progress(self.arrived - len(scheduler.running) - len(scheduler.waiting))
        sampler.close()

    def arrival(self, index: int) -> float:
        """When a request arrives, in seconds of virtual time: the first one at 0."""
        return (self.requests[index].arrival - self.requests[0].arrival) / self.rate

    def _wait_for_link(self) -> bool:
        """Let time pass until a copy ends or a request arrives. False if no copy is under way."""
        link = self.engine.model_executor.link
        end = link.next_end if link else None
        if end is None:
            return False
        later = self.arrival(self.arrived) if self.arrived < len(self.requests) else end
        self.now = max(self.now, min(end, later))
        return True

    def _let_arrive(self) -> None:
        while self.arrived < len(self.requests) and self.arrival(self.arrived) <= self.now:
            request = self.requests[self.arrived]
            answer = chain.from_iterable(request.answer)
            add_request(self.engine, str(self.arrived), request.prompt(), request.output_tokens, answer, request.salt)
            self.arrived += 1

    def _account(self, step: Step) -> None:
        output = step.output
        for new in output.scheduled_new_reqs:
            if new.req_id not in self.seen:
                self.seen.add(new.req_id)
                self.hit_tokens += new.num_computed_tokens
                self.external_tokens += step.external_tokens[new.req_id]
                self.prompt_tokens += self.requests[int(new.req_id)].input_tokens
        seconds = self.costs.seconds(self._work(output)) if output.num_scheduled_tokens else 0.0
        seconds += self.engine.model_executor.waited
        self.now += seconds
        running = len(output.num_scheduled_tokens)
        self.running_peak = max(self.running_peak, running)
        self.running_seconds += seconds * running
        self.scheduler_seconds.append(step.scheduler_seconds)
        self.preemptions += len(output.preempted_req_ids or ())
        for req_id in step.emitted:
            self.last_token[req_id] = self.now - self.arrival(int(req_id))
            self.first_token.setdefault(req_id, self.last_token[req_id])

    def token_times(self) -> Iterator[float]:
        """Of each request with several tokens the seconds from one to the next."""
        for req_id, first in self.first_token.items():
            tokens = self.requests[int(req_id)].output_tokens
            if tokens > 1:
                yield (self.last_token[req_id] - first) / (tokens - 1)

    def _work(self, output: Any) -> Work:
        new = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        new.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        pairs, context = 0.0, 0
        for req_id, tokens in output.num_scheduled_tokens.items():
            before = new[req_id]
            pairs += tokens * (before + (tokens + 1) / 2)
            context += before + tokens
        return Work(output.total_num_scheduled_tokens, pairs, context, len(output.num_scheduled_tokens))


def _link(engine: EngineCore, job: Job, replay: Replay) -> Link:
    """Host memory on the replay's clock."""
    config = engine.scheduler.kv_cache_config
    block_bytes = config.kv_cache_tensors[0].size // config.num_blocks
    link = engine.model_executor.link = Link(job.host_bandwidth, block_bytes, lambda: replay.now)
    if isinstance(engine.scheduler.connector, HostConnector):
        engine.scheduler.connector.host.clock = lambda: replay.now
    return link


def _host_figures(replay: Replay, link: Link | None) -> HostFigures | None:
    if link is None:
        return None
    connector, carried = replay.engine.scheduler.connector, link.carried
    traffic = connector.host.traffic if isinstance(connector, HostConnector) else None
    return HostFigures(
        loaded_bytes=carried.from_host,
        stored_bytes=carried.to_host,
        stalled=carried.stalled,
        loaded_tokens=traffic.loaded_tokens if traffic else replay.external_tokens,
        waited=traffic.wait_seconds if traffic else carried.waited,
    )


def _shape(job: Job, requests: Sequence[TraceRequest]) -> EngineShape:
    # One token more than the longest request, as far as the model was made for so many.
    longest = max(request.input_tokens + request.output_tokens for request in requests)
    return EngineShape(
        hf_config=attention_only(job.config) if job.mode == "bound" else without_weights(job.config),
        kv_bytes=job.kv_bytes,
        side=job.side,
        max_num_seqs=job.max_num_seqs,
        max_model_len=min(longest + 1, job.max_model_len or longest + 1),
        max_num_batched_tokens=job.max_num_batched_tokens,
        prefix_caching=job.prefix_caching,
        eviction=job.eviction,
        queue=job.queue,
        block_size=job.block_size,
        checkpoint_states=job.checkpoint_states if job.side == "elastic" else "same",
        change_specs=partial(typed_layers, kv_dtype=job.kv_dtype, layer_kv_dtypes=job.layer_kv_dtypes),
        host_bytes=0 if job.mode == "bound" else job.host_bytes,
        tp=job.tp,
        drafts=Drafts(job.draft_tokens, job.acceptance, job.seed) if job.draft_tokens else None,
    )


def run_job(job: Job, requests: Sequence[TraceRequest], progress: Callable[[int], None]) -> Result:
    """Replay one mode in this process."""
    shape = _shape(job, requests)
    engine = make_checked_engine(shape)
    # The clock is the hybrid model's in every mode, so that times differ by what the memory policy does alone.
    costs = cost_model(job.config, find_gpu(job.gpu)[1], job.cache_options())
    replay = Replay(engine, costs, requests, job.rate)
    link = _link(engine, job, replay) if shape.host_bytes else None
    meter = MemoryMeter(engine.scheduler, job.kv_bytes, engine.model_executor.specs)

    def look() -> Sample:
        scheduler = engine.scheduler
        return Sample(
            seconds=replay.now,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            hit_tokens=replay.hit_tokens,
            prompt_tokens=replay.prompt_tokens,
            uses=meter.uses(),
        )

    sampler = Sampler(replay.arrival(len(requests) - 1), look)
    began = time.monotonic()
    replay.run(sampler, progress)
    wall = time.monotonic() - began
    geometry = getattr(meter.config, "geometry", None)
    return Result(
        mode=job.mode,
        requests=len(requests),
        prompt_tokens=replay.prompt_tokens,
        hit_tokens=replay.hit_tokens,
        output_tokens=sum(request.output_tokens for request in requests),
        ttft=spread(replay.first_token.values()),
        tpot=spread(times) if (times := list(replay.token_times())) else None,
        e2e=spread(replay.last_token.values()),
        makespan=replay.now,
        preemptions=replay.preemptions,
        running_mean=replay.running_seconds / replay.now,
        running_peak=replay.running_peak,
        extents_moved=meter.extents_moved,
        extents=meter.config.num_blocks if geometry else None,
        extent_bytes=geometry.extent_bytes if geometry else None,
        steps=len(replay.scheduler_seconds),
        scheduler_mean=sum(replay.scheduler_seconds) / len(replay.scheduler_seconds),
        scheduler_median=median(replay.scheduler_seconds),
        wall_seconds=wall,
        block_tokens=next((group.block_tokens for group in meter.groups if group.kind == "attention"), 0),
        groups=meter.groups,
        host=_host_figures(replay, link),
        samples=sampler.samples,
    )
