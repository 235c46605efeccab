"""How a plan speaks: one name and one sentence for everything it reports."""

from __future__ import annotations

from tidepool.plan.planner import CapacityPlan
from tidepool.sides import TITLES, Side
from tidepool.sizes import size

PARTS = {
    "states": ("states", "what state layers keep for the running requests"),
    "attention": ("attention", "keys and values of their tokens"),
    "block_tail": ("block tails", "the unfilled end of each request's last block"),
    "inflation": ("inflated blocks", "more such room, because blocks hold more tokens than asked for"),
    "page_padding": ("page padding", "bytes that only make pages or blocks equal"),
    "group_padding": ("group padding", "room for layers that a group doesn't have"),
    "held_idle": ("reserved, idle", "held for one group, not in use, closed to the others"),
    "overhead": (
        "null block",
        "the block or extent that belongs to nobody, and what is too little for another",
    ),
    "free": ("free", "ready for more requests or for the prefix cache"),
}
"""Parts of an account: a name, and what it means."""


def requests(count: int) -> str:
    """A number of requests."""
    return f"{count:,} request" + ("" if count == 1 else "s")


def tokens(count: int | None) -> str:
    """A number of tokens held: none where it doesn't fit."""
    return "any number" if count is None else f"{count:,}" if count else "don't fit"


def setting(plan: CapacityPlan) -> str:
    """One line on how the model is served."""
    options = plan.options
    parts = [
        f"KV dtype {options.kv_dtype}" + (" but for single layers" if options.layer_kv_dtypes else ""),
        f"state dtype {options.state_dtype}",
        f"blocks of {options.block_tokens} tokens",
        f"prefix caching {'on' if options.prefix_caching else 'off'}",
        f"at most {requests(options.max_num_seqs)}",
    ]
    if options.checkpoint_states != "same":
        parts.append(f"cached states {options.checkpoint_states}")
    if options.tp > 1 or options.pp > 1:
        parts.append(f"tp {options.tp}, pp {options.pp}, figures for one device")
    if options.speculative_tokens:
        drafter = " by the model's own head" if options.mtp else ""
        parts.append(f"{options.speculative_tokens} draft tokens{drafter}")
    return ", ".join(parts)


def budget(plan: CapacityPlan) -> str:
    """One line on where the KV memory comes from."""
    card = plan.card
    total = size(plan.options.kv_bytes)
    if card is None:
        return f"{total} of KV memory"
    return (
        f"{total} of KV memory: {card.name} {size(card.total_bytes)} x {card.utilization:g}, "
        f"less {size(card.weight_bytes)} of weights and {size(card.reserve_bytes)} of reserve"
    )


def reserved(plan: CapacityPlan) -> str:
    """One line on what the reserve is for; nothing where it was given."""
    parts = plan.card.reserve_parts if plan.card else {}
    named = [f"{RESERVE[name]} {size(count)}" for name, count in parts.items() if count]
    return f"reserve: {', '.join(named)}" if named else ""


def mix(plan: CapacityPlan) -> str:
    """The mix of requests, in words."""
    return " and ".join(f"{item.count:,} x {item.tokens:,} tokens" for item in plan.options.mix)


def notes(plan: CapacityPlan) -> list[str]:
    """What a reader has to know beside the figures, a sentence or two each."""
    found = []
    if plan.refusal:
        ours = "" if plan.fallbacks else "; tidepool lowers it by itself"
        found.append(
            f'On a GPU stock vLLM doesn\'t start: "{plan.refusal}". Its CUDA graphs take one for each request, so give '
            f"a lower --max-num-seqs{ours}."
        )
    if plan.fallbacks:
        found.append(
            "tidepool would leave this engine to vLLM, so its columns say what its partitions would make of it: "
            f"{'; '.join(plan.fallbacks)}."
        )
    if plan.max_model_len > plan.model_tokens:
        found.append(
            f"The model was made for {plan.model_tokens:,} tokens; vLLM serves {plan.max_model_len:,} only if it is "
            "told to (VLLM_ALLOW_LONG_MAX_MODEL_LEN=1)."
        )
    if plan.beyond:
        lengths = ", ".join(f"{length:,}" for length in plan.beyond)
        found.append(f"Longer than the longest request of {plan.max_model_len:,} tokens: {lengths}.")
    return found + [f"{TITLES[kind]}: {reason}" for kind, reason in plan.missing.items()]


def serves(plan: CapacityPlan, kind: Side) -> str:
    """Who would serve an engine of this column."""
    if kind == "stock":
        return "vLLM" if plan.starts(kind) else "doesn't start"
    return "tidepool" if plan.starts(kind) else "vLLM (falls back)"


RESERVE = {
    "activations": "activations",
    "graphs": "CUDA graphs",
    "runtime": "runtime",
    "communication": "communication",
}
"""Parts of the reserve."""
