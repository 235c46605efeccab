"""How a plan speaks: one name and one sentence for everything it reports."""

from __future__ import annotations

from tidepool.plan.planner import CapacityPlan
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


def mix(plan: CapacityPlan) -> str:
    """The mix of requests, in words."""
    return " and ".join(f"{item.count:,} x {item.tokens:,} tokens" for item in plan.options.mix)


LATENT = (
    "Attention is latent (MLA) in this model, which is untested beside states, so the plugin leaves it to vLLM; "
    "tidepool's columns say what its partitions would make of it."
)
"""Said of models with latent attention beside states."""

NO_STATES = (
    "No state lies beside attention in this model, so the plugin leaves it to vLLM; tidepool's columns say "
    "what its partitions would make of it."
)
"""Said of models that are not hybrid."""
