"""Weights as a checkpoint names them: the matrices that may be quantized, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer, or as many of one shape as there are experts."""

    name: str
    """As in HF checkpoints, from below the layer's number: ``self_attn.q_proj``, ``mlp.experts.up_proj``."""
    inputs: int
    outputs: int
    count: int = 1
    whole: bool = False
    """Whether every device of a tensor parallel group has all of it, as routers and latent projections are kept."""

    @property
    def parameters(self) -> int:
        """Numbers in all of them."""
        return self.count * self.inputs * self.outputs

    @property
    def expert(self) -> bool:
        """Whether it belongs to the routed experts."""
        return ".experts." in f".{self.name}."

    @property
    def router(self) -> bool:
        """Whether it chooses experts: no method quantizes it."""
        return self.name.rsplit(".", 1)[-1] in ("gate", "router", "layer", "shared_expert_gate")


def parameters(linears: Iterable[Linear]) -> int:
    """Numbers in all of them."""
    return sum(linear.parameters for linear in linears)


def dense(module: str, hidden: int, inner: int, *, gated: bool = True) -> tuple[Linear, ...]:
    """A feed-forward part: up and down, and a gate."""
    names = ("gate_proj", "up_proj") if gated else ("up_proj",)
    return (
        *(Linear(f"{module}.{name}", hidden, inner) for name in names),
        Linear(f"{module}.down_proj", inner, hidden),
    )


def mixture(
    module: str,
    hidden: int,
    inner: int,
    experts: int,
    shared: int = 0,
    *,
    gated: bool = True,
    latent: int | None = None,
    latent_names: tuple[str, str] = ("fc1_latent_proj", "fc2_latent_proj"),
    shared_name: str = "shared_experts",
) -> tuple[Linear, ...]:
    """Routed experts, their router, and a shared expert ``shared`` wide.

    Args:
        module: the layer's name for all of it.
        hidden: numbers of a token.
        inner: width of one expert.
        experts: how many there are.
        shared: width of the shared expert, which reads the token itself; 0 for none.
        gated: whether experts have a gate beside up and down.
        latent: numbers that routed experts see of a token, where they are fewer than ``hidden``: then one projection
            leads there and one back.
        latent_names: names of these two.
        shared_name: the shared expert's name.
    """
    seen = hidden if latent is None else latent
    there, back = latent_names
    around = (
        (Linear(f"{module}.{there}", hidden, seen, whole=True), Linear(f"{module}.{back}", seen, hidden, whole=True))
        if latent is not None
        else ()
    )
    names = ("gate_proj", "up_proj") if gated else ("up_proj",)
    return (
        Linear(f"{module}.gate", hidden, experts, whole=True),
        *around,
        *(Linear(f"{module}.experts.{name}", seen, inner, experts) for name in names),
        Linear(f"{module}.experts.down_proj", inner, seen, experts),
        *(dense(f"{module}.{shared_name}", hidden, shared, gated=gated) if shared else ()),
    )
