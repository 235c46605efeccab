"""Where every byte of the KV memory goes while a mix of requests runs.

The parts of an `Account` always add up to the budget; a test holds that for every model of the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from tidepool.cache import SlidingWindow, State
from tidepool.capacity.memory import Memory, PlannedGroup


@dataclass(frozen=True)
class Requests:
    """So many requests of so many tokens each."""

    count: int
    tokens: int


@dataclass(frozen=True)
class Account:
    """Bytes of KV memory by what they are for."""

    states: int = 0
    """States of running requests."""
    attention: int = 0
    """Keys and values of their tokens."""
    block_tail: int = 0
    """Room for tokens in the last blocks that the requests would have at the asked-for block size too."""
    inflation: int = 0
    """Room for tokens in blocks that is there only because blocks are larger than asked for."""
    page_padding: int = 0
    """What makes pages equal (stock) or lets blocks tile an extent (elastic)."""
    group_padding: int = 0
    """Room for layers that a group doesn't have."""
    held_idle: int = 0
    """Set aside for a group, not in use, and not available to another."""
    overhead: int = 0
    """The null block or extent, and what is left over from the budget."""
    free: int = 0
    """To be had: by any group, or by attention only where the partition is fixed."""

    @property
    def total(self) -> int:
        """All parts: the budget."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def waste(self) -> int:
        """All that is neither a state, nor a token, nor free."""
        return self.total - self.states - self.attention - self.free


def admit(memory: Memory, mix: Iterable[Requests]) -> list[Requests]:
    """The requests of ``mix`` that run at once, taken in its order until one doesn't fit."""
    admitted: list[Requests] = []
    for wanted in mix:
        before = [(requests.count, requests.tokens) for requests in admitted]
        count = memory.most(wanted.count, wanted.tokens, before)
        if count:
            admitted.append(Requests(count, wanted.tokens))
        if count < wanted.count:
            break
    return admitted


def account(memory: Memory, requests: Iterable[Requests], block_tokens: int) -> Account:
    """Where the bytes go while ``requests`` run, which must fit.

    Args:
        memory: the KV memory.
        requests: what runs.
        block_tokens: tokens of an attention block that were asked for; larger blocks count as inflation.
    """
    running = list(requests)
    blocks = memory.needs([(r.count, r.tokens) for r in running])
    states = attention = tail = inflation = page = group_padding = 0
    for group, held in zip(memory.groups, blocks, strict=True):
        page += held * group.page_padding
        group_padding += held * group.group_padding
        if isinstance(group.cache, State):
            states += held * group.natural_bytes
            continue
        stored, room, plain_room = _tokens(group, running, block_tokens)
        attention += stored * group.token_bytes
        tail += (plain_room - stored) * group.token_bytes
        inflation += (room - plain_room) * group.token_bytes
    idle = memory.held_idle_bytes(blocks)
    used = sum(held * group.stride for group, held in zip(memory.groups, blocks, strict=True))
    return Account(
        states=states,
        attention=attention,
        block_tail=tail,
        inflation=inflation,
        page_padding=page,
        group_padding=group_padding,
        held_idle=idle,
        overhead=memory.overhead_bytes,
        free=memory.budget_bytes - used - idle - memory.overhead_bytes,
    )


def _tokens(group: PlannedGroup, running: list[Requests], block_tokens: int) -> tuple[int, int, int]:
    """Tokens stored, room in the blocks held, and room in them were they of ``block_tokens`` tokens."""
    stored = room = plain = 0
    for requests in running:
        held = requests.tokens
        if isinstance(group.cache, SlidingWindow):
            held = min(held, group.cache.window)
        stored += requests.count * held
        room += requests.count * group.blocks_for(requests.tokens) * group.block_tokens
        smaller = min(block_tokens, group.block_tokens)
        plain += requests.count * group.cache.blocks_for(requests.tokens, smaller) * smaller
    return stored, room, plain
