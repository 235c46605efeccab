"""What training leaves behind: the checkpoint that is shipped and the curve in the docs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import torch
from hybrid import CONFIG
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tidepool.verify.task import MAX_TOKENS, SPECIALS, WORDS


def write_checkpoint(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer as vLLM and transformers load them."""
    path.mkdir(parents=True, exist_ok=True)
    # vLLM computes with A_log in float32 and transformers in bfloat16: so it is stored as the former, rounded.
    rounded = {
        name: weight.bfloat16().float() if name.endswith("A_log") else weight.bfloat16()
        for name, weight in weights.items()
    }
    save_file(rounded, path / "model.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors").chmod(0o644)
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token=SPECIALS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # puts blanks between words
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config.json": CONFIG | {"vocab_size": len(WORDS)},
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIALS[0],
            "pad_token": SPECIALS[0],
            "unk_token": SPECIALS[1],
            "model_max_length": MAX_TOKENS,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# The curve --------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 332, 56, 36, 16, 44


def plot(log: Path, figure: Path) -> None:
    """Draw the share of exact answers over the steps, and above it the length of texts in tokens."""
    with log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first, last = int(rows[0]["step"]), int(rows[-1]["step"])
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return round(_LEFT + inner_width * math.log(step / first) / math.log(last / first), 1)

    def y(share: float) -> float:
        return round(_TOP + inner_height * (1 - share), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#444">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{_LEFT} {y(share)}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>')
    for step in (25, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000):
        if first <= step <= last:
            parts.append(f'<text x="{x(step)}" y="{_HEIGHT - 24}" text-anchor="middle">{step:,}</text>')
    parts.append(
        f'<text x="{_LEFT + inner_width / 2}" y="{_HEIGHT - 6}" text-anchor="middle">steps (logarithmic)</text>'
    )
    level = None
    for row in rows:
        if row["level"] != level:
            level = row["level"]
            at = x(int(row["step"]))
            parts.append(f'<path d="M{at} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#bbb" stroke-dasharray="3 3"/>')
            above = _TOP - 6 - 14 * (int(level) % 2)  # neighbours may be close
            parts.append(f'<text x="{at + 3}" y="{above}" fill="#888">{int(row["length"]):,}</text>')
    for kind, colour, place in (("fact", "#1f6fb2", 0), ("register", "#d1672a", 1)):
        points = " ".join(f"{x(int(row['step']))},{y(float(row[kind]))}" for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        below = _HEIGHT - _BOTTOM - 30 + 16 * place
        parts.append(f'<text x="{_WIDTH - _RIGHT - 8}" y="{below}" text-anchor="end" fill="{colour}">{kind}s</text>')
    figure.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
