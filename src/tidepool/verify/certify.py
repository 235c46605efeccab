"""From a verification to certificates, and what lies in their folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tidepool.certificates import Certificate, Setup, code_hash, read_all, withdraw, write
from tidepool.verify.report import Row


def certify(rows: Sequence[Row], holds: bool, command: str) -> Iterator[str]:
    """Write a certificate for each setup that was verified, or withdraw those that have turned out not to hold.

    The scenarios of one model on one runner stand for one setup: where their engines weren't alike, none was verified.

    Args:
        rows: of all scenarios, without those that need another device.
        holds: whether all of them held.
        command: what was run.

    Yields:
        What became of each, a sentence.

    Raises:
        OSError: the folder can't be written to.
    """
    setups: dict[tuple[str, int], set[Setup]] = {}
    for row in rows:
        if row.outcome.setup:
            setups.setdefault((row.part.scenario.model, row.part.runner), set()).add(row.outcome.setup)
    for found in setups.values():
        first, *others = sorted(found)
        if not holds:
            for setup in found:
                withdraw(setup)
        elif others:
            names = ", ".join(sorted({name for other in others for name in first.differences(other)}))
            yield f"No certificate: the engines with {first.states} differed in {names}."
        else:
            yield f"Certificate for {words(first)}: {write(first, command)}"


def listing() -> Iterator[str]:
    """A line for each file in the certificates' folder."""
    for path, found in read_all().items():
        if not isinstance(found, Certificate):
            yield f"{path.name}: no certificate, {found}"
            continue
        other = "" if found.setup.code == code_hash() else "; of another version of tidepool"
        yield f"{path.name}: {found.made} UTC, {words(found.setup)}; by {found.command}{other}"


def words(setup: Setup) -> str:
    """A setup, for people."""
    device = ", ".join(filter(None, (setup.device, setup.driver and f"driver {setup.driver}")))
    kinds = f"{setup.attention} {setup.kv_dtype} beside {setup.states} {setup.state_dtypes}, runner {setup.runner}"
    return f"{device}; vLLM {setup.vllm}; {kinds}; drafts {setup.drafts}, ranks {setup.ranks}"
