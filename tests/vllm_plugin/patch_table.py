"""The tables of patches as docs/design.md shows them. Run as a script it writes them there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "design.md"
MARK = "<!-- {} of tests/vllm_plugin/patch_table.py -->"
HEAD = ("vLLM", "series", "what tidepool does", "why a patch", "until")


def rows_of(table: Iterable[Any]) -> list[str]:
    from tidepool.vllm_plugin.versions import SERIES

    cells = [HEAD, ("---",) * len(HEAD)]
    for patch in table:
        device = f" ({patch.device} only)" if patch.device else ""
        series = "all" if patch.series == SERIES else ", ".join(patch.series)
        cells.append((f"`{patch.target.removeprefix('vllm.')}`{device}", series, patch.does, patch.why, patch.until))
    return [f"| {' | '.join(row)} |" for row in cells]


def with_tables(text: str) -> str:
    """The document with the tables as they are in the code."""
    from tidepool.vllm_plugin.compat import WORKAROUNDS
    from tidepool.vllm_plugin.patches import PATCHES

    for name, table in {"patches": PATCHES, "work-arounds": WORKAROUNDS}.items():
        begin, end = MARK.format(f"begin {name}"), MARK.format(f"end {name}")
        body = "\n".join([begin, "", *rows_of(table), "", end])
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert opened, f"the document has no place for the {name}"
        assert closed, f"the document has no place for the {name}"
        text = before + body + after
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
