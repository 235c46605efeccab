"""vLLM's priority scheduling over tidepool's pools: real engine cores, with the model left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tidepool.models import entry
from tidepool.vllm_plugin.settings import ENV_OVERCOMMIT

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
URGENT, PATIENT = 0, 9
"""vLLM serves lower numbers first."""
PROMPT, ANSWER = 1_000, 3_000
MEMORY = 3 << 29
"""Less than all prompts and answers take."""
REQUESTS = 12


def ask(engine: Any, name: str, first: int, priority: int) -> None:
    """Queue a prompt that begins with this token, and so shares nothing with others."""
    from tidepool.replay.engine import add_request

    added = engine.add_request
    engine.add_request = lambda request, wave=0: added(_with_priority(request, priority), wave)
    try:
        add_request(engine, name, [first + place for place in range(PROMPT)], ANSWER)
    finally:
        del engine.add_request


def _with_priority(request: Any, priority: int) -> Any:
    request.priority = priority
    return request


def serve(policy: str) -> tuple[list[str], set[str], dict[str, int]]:
    """Ask patient and urgent ones in turn, more than there is room for.

    Returns:
        (names in the order in which they began, those that were preempted, priority of each).
    """
    from tidepool.replay.engine import EngineShape, make_checked_engine
    from tidepool.replay.step import take_step

    shape = EngineShape(entry("Qwen3.5-4B").config, MEMORY, "elastic", max_num_seqs=REQUESTS, max_model_len=8_192)
    engine = make_checked_engine(replace(shape, options={"scheduling_policy": policy}))
    priorities = {str(number): (PATIENT, URGENT)[number % 2] for number in range(REQUESTS)}
    for name, priority in priorities.items():
        ask(engine, name, 10_000 * (int(name) + 1), priority)
    began: dict[str, None] = {}
    preempted: set[str] = set()
    while engine.scheduler.has_unfinished_requests():
        output = take_step(engine).output
        began |= dict.fromkeys(request.req_id for request in output.scheduled_new_reqs)
        preempted |= {name for name, each in engine.scheduler.requests.items() if each.num_preemptions}
    assert engine.scheduler.kv_cache_manager.block_pool.arena.usage().in_use == 0, "blocks leaked"
    return list(began), preempted, priorities


def test_the_urgent_go_first_and_take_the_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_OVERCOMMIT, "1")
    began, preempted, priorities = serve("priority")
    assert [priorities[name] for name in began] == sorted(priorities.values())
    assert preempted
    assert {priorities[name] for name in preempted} == {PATIENT}
    began, preempted, priorities = serve("fcfs")
    assert began == list(priorities), "first come, first served"
    assert URGENT in {priorities[name] for name in preempted}, "or the memory was too large to tell"
