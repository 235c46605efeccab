"""States that go back to the last accepted token: the CPU twins by their definition."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
rollback = pytest.importorskip("tidepool.vllm_plugin.rollback")

CHANNELS, WIDTH, DRAFTS = 6, 4, 3


def test_a_convolution_goes_on_from_the_accepted_tokens() -> None:
    """Two requests over many steps, with any number of drafts, of which any number is accepted."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, WIDTH, generator=generator)
    bias = torch.randn(CHANNELS, generator=generator)
    windows = torch.zeros(3, CHANNELS, WIDTH - 1 + DRAFTS)
    accepted = torch.tensor([1, 1])
    read: list[Any] = [torch.zeros(WIDTH - 1, CHANNELS) for _ in range(2)]
    for _ in range(20):
        lengths = torch.randint(1, DRAFTS + 2, (2,), generator=generator)
        starts = torch.tensor([0, int(lengths[0]), int(lengths.sum())])
        x = torch.randn(int(lengths.sum()), CHANNELS, generator=generator)
        out = rollback.convolve_drafts(x, windows, weight, bias, False, torch.tensor([2, 1]), starts, accepted)
        for row in range(2):
            new = x[starts[row] : starts[row + 1]]
            text = torch.cat([read[row], new])
            expected = [
                (text[end - WIDTH : end].T * weight).sum(1) + bias for end in range(len(read[row]) + 1, len(text) + 1)
            ]
            torch.testing.assert_close(out[starts[row] : starts[row + 1]], torch.stack(expected))
        accepted = torch.stack([torch.randint(1, int(n) + 1, (), generator=generator) for n in lengths])
        read = [torch.cat([read[row], x[starts[row] : starts[row] + accepted[row]]]) for row in range(2)]
    assert not windows[0].any(), "the null block isn't touched"


def test_a_request_that_accepted_nothing_is_an_error() -> None:
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gave a request no token"):
        rollback.convolve_drafts(
            torch.zeros(1, CHANNELS),
            torch.zeros(1, CHANNELS, WIDTH),
            torch.zeros(CHANNELS, WIDTH),
            None,
            True,
            one,
            torch.tensor([0, 1]),
            one,
        )


def test_states_are_left_after_every_token() -> None:
    """A state here is the sum of the tokens read; the kernel writes to the block that it reads."""

    def kernel(_: Any, state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, **given: Any) -> None:
        assert given["num_accepted_tokens"] is None
        for row, block in enumerate(given["state_batch_indices"].tolist()):
            state[block] += x[row]
            given["out"][row] = state[block]

    update = functools.partial(rollback.state_update, kernel)
    state = torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    blocks = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    x = torch.tensor([1.0, 2.0, 3.0, 7.0])
    out = torch.zeros(4)
    update(
        None,
        state,
        x,
        x,
        x,
        x,
        x,
        state_batch_indices=blocks,
        dst_state_batch_indices=blocks,
        out=out,
        num_accepted_tokens=torch.tensor([2, 3]),
        cu_seqlens=torch.tensor([0, 3, 4]),
    )
    assert out.tolist() == [21, 23, 26, 67]
    assert state.tolist() == [0, 21, 23, 26, 67, 50, 60]


class Layout:
    """One request's block table, a convolution of two columns a token and a state, in memory."""

    def __init__(self) -> None:
        self.table = torch.tensor([[0, 0, 0], [3, 1, 2]], dtype=torch.int32)
        self.windows = torch.arange(4 * 4 * 2, dtype=torch.float32).view(4, 4, 2)
        self.states = torch.arange(4 * 5, dtype=torch.float32).view(4, 5)
        both = (self.windows, self.states)

        def numbers(*values: int) -> Any:
            return torch.tensor(values, dtype=torch.int64)

        self.arguments = (
            numbers(self.table.data_ptr()),
            self.table.stride(0),
            numbers(*(each.data_ptr() for each in both)),
            numbers(*(4 * each.stride(0) for each in both)),
            numbers(4, 4),
            numbers(2, 5),
            numbers(4, 0),
            numbers(0, 0),
            numbers(0, 0),
            numbers(0, 0),
        )


def test_a_state_moves_before_a_step() -> None:
    layout = Layout()
    window, state = layout.windows[3, 1:].clone(), layout.states[1].clone()
    rollback.copy_before_step(
        torch.tensor([-1, 2]), torch.tensor([-1, 0]), torch.tensor([0, 1]), *layout.arguments, None, 2
    )
    torch.testing.assert_close(layout.windows[2, :3], window)
    torch.testing.assert_close(layout.states[2], state)


@pytest.mark.parametrize(("accepted", "moves"), [(1, False), (2, True), (3, True)])
def test_the_state_at_a_checkpoint_is_kept(accepted: int, moves: bool) -> None:
    """Tokens 6, 7 and 8 are read, the first of them no draft, and checkpoints are 8 apart: after tokens 7."""
    layout = Layout()
    before, state = layout.states[3].clone(), layout.states[2].clone()
    out = torch.tensor([1, accepted])
    tokens = [torch.tensor([1, value]) for value in (accepted, 1, 3, 6, 2)]
    rollback.copy_after_step(*tokens, *layout.arguments, out, None, 2, block_size=8)
    torch.testing.assert_close(layout.states[3], state if moves else before)
    assert out.tolist() == [1, accepted]
