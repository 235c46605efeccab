import json
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from safetensors.torch import load_file
from tokenizers import Tokenizer

from tidepool.testing.tiny import MAX_POSITIONS, VOCAB_SIZE, Family, make_checkpoint

FAMILIES: tuple[Family, ...] = get_args(Family)
SHAPED: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
"""Those that `make run` serves."""


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def state_bytes(family: Family, config: dict[str, Any]) -> int:
    """Bytes of one layer's state: the recurrent part in float32, the convolution's in bfloat16."""
    if family == "qwen3.5":
        key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        value = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        recurrent, conv = value * config["linear_key_head_dim"], 2 * key + value
    else:
        inner = config["mamba_num_heads"] * config["mamba_head_dim"]
        recurrent = inner * config["ssm_state_size"]
        conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    return int(4 * recurrent + 2 * 3 * conv)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    first = make_checkpoint(family, tmp_path / "first")
    again = make_checkpoint(family, tmp_path / "again")
    other = make_checkpoint(family, tmp_path / "other", seed=1)

    names = sorted(file.name for file in first.iterdir())
    sees = ["preprocessor_config.json", "video_preprocessor_config.json"] * (family == "qwen3.5-vl")
    assert names == sorted(
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            *sees,
        ]
    )
    for name in names:
        content = (first / name).read_bytes()
        assert content == (again / name).read_bytes()
        assert (content != (other / name).read_bytes()) == (name == "model.safetensors")
        assert len(content) < 15e6


@pytest.mark.parametrize("text", ["What is 12 + 30?\n", "pools, tides", "  two  spaces", "über 潮 🐟", ""])
def test_text_survives_the_tokenizer(text: str, tmp_path: Path) -> None:
    path = make_checkpoint("qwen3.5", tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_merges_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    path = make_checkpoint("nemotron-h", tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "The tide comes in and the tide goes out"
    assert len(tokenizer.encode(text).ids) < len(text) / 2
    assert tokenizer.encode("<|im_end|>").ids == [tokenizer.token_to_id("<|im_end|>")]


@pytest.mark.parametrize("family", SHAPED)
def test_shape_mimics_the_real_models(family: Family, tmp_path: Path) -> None:
    config = config_of(make_checkpoint(family, tmp_path))
    per_token = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    assert config["max_position_embeddings"] == MAX_POSITIONS
    assert 500 < state_bytes(family, config) / per_token < 1000  # tokens that one state weighs
    if family == "qwen3.5":
        kinds = config["layer_types"]
        assert kinds.count("linear_attention") == 3 * kinds.count("full_attention") == 6
    else:
        pattern = config["hybrid_override_pattern"]
        assert len(pattern) == config["num_hidden_layers"]
        assert pattern.count("M") % pattern.count("*") != 0  # no equal groups without filling up


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_never_emit_what_cannot_be_read(family: Family, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    weights = load_file(path / "model.safetensors")
    # Where the head is the embedding too, there is but one of them in the file.
    head = weights.get("lm_head.weight", weights.get("model.embed_tokens.weight"))
    assert head is not None
    emitted = head.float().norm(dim=1).nonzero().flatten().tolist()
    assert len(emitted) > VOCAB_SIZE / 2
    assert tokenizer.decode(emitted).isascii()
    config = config_of(path)
    assert config.get("text_config", config)["eos_token_id"] not in emitted
