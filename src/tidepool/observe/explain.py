"""What limits a server, or a replay, and which one setting would help: plain sentences, with their arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from tidepool.cache import State, TokenResult
from tidepool.capacity.memory import Memory
from tidepool.command_line import UsageError
from tidepool.models import CacheOptions, Model, ModelConfigError, entry, find_model, names
from tidepool.observe.look import Look
from tidepool.replay.job import USES
from tidepool.replay.report import Report
from tidepool.sizes import percent, size

_MORE = 1.25
"""The memory that a better one is compared with, over today's."""
_BUSY = 0.1
"""Requests wait if they do in at least this share of looks."""
_MANY_MISSED = 0.05
"""Tokens missed for one reason are worth a setting from this share on."""
_MANY_STATES = 1 / 3
"""Smaller states are worth their rounding where they are at least this share of what is cached."""


@dataclass(frozen=True)
class Evidence:
    """What is known of an engine, from a server or from a replay."""

    what: str
    waits: float
    """Share of looks at which requests waited, 0 to 1."""
    waiting: float
    """Requests, on average."""
    running: float
    running_most: float
    max_num_seqs: int
    """Of all engines together."""
    memory: Mapping[str, float]
    """Bytes of the device by use, on average; see `tidepool.observe.look.USES`."""
    host_bytes: int
    refused: Mapping[str, int]
    tokens: Mapping[str, int]
    """Of prompts by what became of them; only hits and the others of a replay."""
    state_bytes: int
    token_bytes: int
    cached_state_bytes: int = 0
    """Of a cached state, where that is known; it may be packed."""
    eight_bit_bytes: int = 0
    """Of one that is packed in 8 bits, where that is known and the setting for it has any effect."""
    hits_without_states: int = 0
    """Tokens of a replay that hit where states take no memory; 0 where that isn't known."""
    checkpoint_tokens: int = 0
    requests: int = 0
    """That were looked up."""
    eviction_age: float | None = None
    return_age: float | None = None
    look: Look | None = None

    @property
    def total(self) -> float:
        """All of the device's memory."""
        return sum(self.memory.values())


def evidence_of(looks: Sequence[Look]) -> Evidence:
    """From looks at a server, one or more."""
    last, count = looks[-1], len(looks)
    lately = {kind: refused - looks[0].refused[kind] for kind, refused in last.refused.items()}
    device = [look.memory["device"] for look in looks]
    return Evidence(
        what=f"{last.model}, by {count} looks",
        waits=sum(look.waiting > 0 for look in looks) / count,
        waiting=sum(look.waiting for look in looks) / count,
        running=sum(look.running for look in looks) / count,
        running_most=max(look.running for look in looks),
        max_num_seqs=last.max_num_seqs * last.engines,
        memory={use: sum(each[use] for each in device) / count for use in device[0]},
        host_bytes=last.bytes_of("host"),
        refused=lately if any(lately.values()) else last.refused,
        tokens=last.tokens,
        state_bytes=last.state_bytes,
        cached_state_bytes=last.cached_state_bytes,
        eight_bit_bytes=_eight_bits(_served(last.model), last.state_bytes) if last.packs else 0,
        token_bytes=last.token_bytes,
        checkpoint_tokens=last.checkpoint_tokens,
        requests=sum(last.lookups.values()),
        eviction_age=last.eviction_age,
        return_age=last.return_age,
        look=last,
    )


def evidence_of_replay(report: Report) -> Evidence:
    """From a replay: its elastic mode, or else its first.

    Raises:
        UsageError: nobody looked at its memory.
    """
    by_mode = {result.mode: result for result in report.results}
    result, setting = by_mode.get("elastic", report.results[0]), report.setting
    samples, states = result.samples, [group for group in result.groups if group.kind == "state"]
    if not samples:
        raise UsageError("The replay has no look at its memory.")
    state_bytes = sum(group.natural_bytes for group in states)
    packs = result.mode == "elastic" and setting.prefix_caching and setting.checkpoint_states == "same"
    return Evidence(
        what=f"{setting.model}, replay of {setting.source}, {result.mode}",
        waits=sum(each.waiting > 0 for each in samples) / len(samples),
        waiting=sum(each.waiting for each in samples) / len(samples),
        running=result.running_mean,
        running_most=result.running_peak,
        max_num_seqs=setting.max_num_seqs,
        memory={use: sum(each.uses[index] for each in samples) / len(samples) for index, use in enumerate(USES)},
        host_bytes=setting.host_bytes,
        refused={},
        tokens={TokenResult.DEVICE: result.hit_tokens, TokenResult.NEW: result.prompt_tokens - result.hit_tokens},
        state_bytes=state_bytes,
        eight_bit_bytes=_eight_bits(_replayed(setting.model), state_bytes) if packs else 0,
        hits_without_states=by_mode["bound"].hit_tokens if "bound" in by_mode else 0,
        token_bytes=sum(
            group.natural_bytes // group.block_tokens for group in result.groups if group.kind == "attention"
        ),
    )


def _served(name: str) -> Model | None:
    """The shapes of a model that is served under a name of the catalogue, as by default it is."""
    known = name.rsplit("/", 1)[-1]
    return entry(known).model() if known in names() else None


def _replayed(name_or_path: str) -> Model | None:
    """The shapes of a replay's model, if it is there."""
    try:
        return find_model(name_or_path)[2]
    except ModelConfigError:
        return None


def _eight_bits(model: Model | None, state_bytes: int) -> int:
    """Bytes of a state packed in 8 bits, of all that ``state_bytes`` are as it runs; 0 where it wouldn't be packed."""
    caches = model.layer_caches(CacheOptions(checkpoint_states="int8")).values() if model else ()
    packed = [cache for cache in caches if isinstance(cache, State) and cache.packed_bytes]
    share = sum(cache.packed_bytes for cache in packed) / max(sum(cache.bytes for cache in packed), 1)
    return round(state_bytes * share)


@dataclass(frozen=True)
class Explanation:
    """What there is to say."""

    limit: str
    """``arrivals``, ``max_num_seqs``, ``states``, ``attention`` or ``reserve``."""
    sentences: tuple[str, ...]
    setting: str | None
    """The one that would help most; None if none would."""
    advice: str


def explain(evidence: Evidence) -> Explanation:
    """Say what limits an engine now, and what would help."""
    limit = _limit(evidence)
    sentences = [_memory(evidence), _limit_sentence(evidence, limit), *_hit_sentences(evidence)]
    setting, advice = _advice(evidence, limit)
    return Explanation(limit, tuple(sentences), setting, advice)


def _limit(evidence: Evidence) -> str:
    if evidence.waits < _BUSY:
        return "arrivals"
    if evidence.running_most >= evidence.max_num_seqs:
        return "max_num_seqs"
    refused = {kind: count for kind, count in evidence.refused.items() if count}
    if refused:
        kind = max(refused, key=refused.__getitem__)
        return "attention" if kind == "window" else kind
    return "states" if evidence.memory.get("states", 0) > evidence.memory.get("attention", 0) else "attention"


def _memory(evidence: Evidence) -> str:
    in_use = [evidence.memory.get(use, 0) for use in ("states", "attention")]
    cached = sum(evidence.memory.get(use, 0) for use in ("cached_states", "cached_attention"))
    states, attention = (percent(each / evidence.total) for each in in_use)
    return (
        f"Of {size(round(evidence.total))} of KV memory, states of running requests take {states}, their attention "
        f"{attention}, and what is cached for later prompts {percent(cached / evidence.total)}."
    )


def _limit_sentence(evidence: Evidence, limit: str) -> str:
    running = f"{evidence.running:,.1f} requests run on average"
    if limit == "arrivals":
        return f"The arrival rate limits it: {running}, and hardly any waits."
    waiting = f"{running} and {evidence.waiting:,.1f} wait"
    if limit == "max_num_seqs":
        return f"max_num_seqs limits it: {waiting}, and no more than {evidence.max_num_seqs:,} may run."
    if limit == "reserve":
        return (
            f"Memory limits it: {waiting}. Those refused would have fitted, but running requests will need that memory "
            "for the rest of their answers."
        )
    each = (
        f"a request's states take {size(evidence.state_bytes)}, as much as the attention of "
        f"{evidence.state_bytes // max(evidence.token_bytes, 1):,} tokens"
        if limit == "states"
        else f"1,000 tokens of attention take {size(1000 * evidence.token_bytes)}"
    )
    return f"Memory for {limit} limits it: {waiting}; {each}."


def _hit_sentences(evidence: Evidence) -> Iterator[str]:
    total = sum(evidence.tokens.values())
    if not total:
        yield "No prompt was looked up in the prefix cache."
        return
    shares = {part: count / total for part, count in evidence.tokens.items()}
    hits = shares.get(TokenResult.DEVICE, 0) + shares.get(TokenResult.HOST, 0)
    host = f", {percent(shares[TokenResult.HOST])} of them from host memory" if shares.get(TokenResult.HOST) else ""
    yield f"{percent(hits)} of {total:,} prompt tokens hit{host}."
    if share := shares.get(TokenResult.EVICTED):
        ages = ""
        if evidence.eviction_age is not None and evidence.return_age is not None:
            ages = (
                f" Half of what is evicted is no older than {evidence.eviction_age:g} memories allocated, and "
                f"three of four prompts come back within {evidence.return_age:g}."
            )
        yield f"{percent(share)} had been cached and were evicted before the prompt came back.{ages}"
    if share := shares.get(TokenResult.NO_STATE):
        yield f"{percent(share)} had their attention cached, and no state at its end."
    if (more := _lost_to_states(evidence)) > 0:
        yield f"{percent(more / total)} more would hit if states took no memory."


def _advice(evidence: Evidence, limit: str) -> tuple[str | None, str]:
    if limit == "max_num_seqs":
        return _more_seqs(evidence)
    if limit in ("states", "attention", "reserve"):
        return "--gpu-memory-utilization", _more_memory(evidence)
    if text := _smaller_states(evidence):
        return "checkpoint_states", text
    total = sum(evidence.tokens.values())
    evicted = evidence.tokens.get(TokenResult.EVICTED, 0)
    if total and evicted > _MANY_MISSED * total:
        wanted = evidence.total * max(1.0, evidence.return_age or 1.0)
        setting = "--kv-offloading-size"
        more = size(ceil(wanted))
        today = f" in place of {size(evidence.host_bytes)}" if evidence.host_bytes else ""
        return setting, (
            f"{setting} {ceil(wanted / (1 << 30))} would help: {more} of host memory{today} hold what "
            f"{max(1.0, evidence.return_age or 1.0):g} memories of {size(round(evidence.total))} have seen, so that up "
            f"to {percent(evicted / total)} more of the tokens could hit."
        )
    missed = evidence.tokens.get(TokenResult.NO_STATE, 0)
    spacing = evidence.checkpoint_tokens
    if total and missed > _MANY_MISSED * total and missed < spacing * max(evidence.requests, 1):
        each, kept = missed / max(evidence.requests, 1), evidence.cached_state_bytes or evidence.state_bytes
        return "checkpoint_tokens", (
            f"checkpoint_tokens {spacing // 2} would help: a prompt misses {each:,.0f} tokens on average behind its "
            f"last checkpoint, which lie {spacing:,} apart. Each checkpoint kept takes {size(kept)}."
        )
    if _lost_to_states(evidence) > _MANY_MISSED * total:
        return "--gpu-memory-utilization", _more_memory(evidence)
    if TokenResult.EVICTED not in evidence.tokens and not evidence.hits_without_states:
        return None, (
            "No setting is known to help: all requests run at once, and which prompts had been cached isn't told. "
            "Replayed with the mode bound, too, it is."
        )
    return None, "No setting would help: all requests run at once, and what misses was never there."


def _smaller_states(evidence: Evidence) -> str | None:
    """What packing cached states would bring; None unless they are much of a cache that forgets too early.

    Where prompts come back later than a cache so much larger would keep them, packing doesn't help enough.
    """
    cached = {kind: evidence.memory.get(f"cached_{kind}", 0) for kind in ("states", "attention")}
    share = cached["states"] / max(sum(cached.values()), 1)
    lost = max(evidence.tokens.get(TokenResult.EVICTED, 0), _lost_to_states(evidence))
    if not evidence.eight_bit_bytes or share < _MANY_STATES or lost <= _MANY_MISSED * sum(evidence.tokens.values()):
        return None
    larger = 1 / (1 - share * (1 - evidence.eight_bit_bytes / evidence.state_bytes))
    if evidence.return_age is not None and evidence.return_age > larger:
        return None
    return (
        f"checkpoint_states int8 would help: {percent(share)} of what is cached are states of "
        f"{size(evidence.state_bytes)}, which take {size(evidence.eight_bit_bytes)} in 8 bits, so that the cache holds "
        f"{larger:.1f} times as much. It rounds them, so answers behind a hit may differ."
    )


def _lost_to_states(evidence: Evidence) -> int:
    """Tokens of a replay that would hit if states took no memory."""
    hits = sum(evidence.tokens.get(part, 0) for part in (TokenResult.DEVICE, TokenResult.HOST))
    return max(0, evidence.hits_without_states - hits)


def _more_seqs(evidence: Evidence) -> tuple[str | None, str]:
    free = sum(evidence.memory.get(use, 0) for use in ("unowned", "idle", "cached_states", "cached_attention", "free"))
    taken = sum(evidence.memory.get(use, 0) for use in ("states", "attention"))
    each = taken / max(evidence.running, 1)
    more = int(free / each) if each else 0
    if more < 1:
        return "--gpu-memory-utilization", _more_memory(evidence)
    return "--max-num-seqs", (
        f"--max-num-seqs {evidence.max_num_seqs + more:,} would help: a running request takes {size(round(each))}, and "
        f"{size(round(free))} aren't in use, room for {more:,} more; tidepool lowers it to those whose states fit."
    )


def _more_memory(evidence: Evidence) -> str:
    tokens = round(evidence.memory.get("attention", 0) / max(evidence.token_bytes, 1) / max(evidence.running, 1))
    text = "More memory would help: raise --gpu-memory-utilization (or --kv-cache-memory-bytes, or use a larger card)."
    planned = evidence.look.planned(round(evidence.total)) if evidence.look else None
    if planned is None or evidence.look is None or tokens <= 0:
        return text
    more = evidence.look.planned(round(evidence.total * _MORE))
    assert more is not None
    now, then = _requests_of(planned, tokens), _requests_of(more, tokens)
    fit = f"{now:,} fit in {size(planned.budget_bytes)} and {then:,} in {size(more.budget_bytes)}"
    return f"{text} Of requests of {tokens:,} tokens, as they run now, with one state each {fit}."


def _requests_of(memory: Memory, tokens: int) -> int:
    """As `Memory.requests_of`, without a limit on requests but the memory itself."""
    return memory.most(memory.budget_bytes, tokens, ())
