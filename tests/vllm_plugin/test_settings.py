from __future__ import annotations

from typing import Any

import pytest

from tidepool.tqkv.formats import FORMATS
from tidepool.vllm_plugin.settings import Settings, SettingsError, check_kv, poison_requested, read_settings


def test_defaults() -> None:
    assert read_settings({}, {}) == Settings()
    assert read_settings(None, {}).enabled
    assert read_settings({"other": 1}, {}).partition == "elastic"


@pytest.mark.parametrize(
    ("given", "switch", "enabled", "partition"),
    [
        ({}, "off", False, "elastic"),
        ({}, "fixed", True, "fixed"),
        ({"partition": "fixed"}, "elastic", True, "elastic"),
        ({"enabled": False}, "elastic", True, "elastic"),
        ({"enabled": False}, "", False, "elastic"),
        ({"partition": "fixed"}, "off", False, "fixed"),
    ],
)
def test_the_environment_wins(given: dict[str, Any], switch: str, enabled: bool, partition: str) -> None:
    settings = read_settings({"tidepool": given}, {"TIDEPOOL": switch})
    assert (settings.enabled, settings.partition) == (enabled, partition)


WRONG: list[tuple[Any, str]] = [
    ({"partion": "fixed"}, "has no key 'partion'; it has enabled, partition"),
    ({"partition": "rubber"}, "'partition'.*can't be 'rubber': Input should be 'elastic' or 'fixed'"),
    ({"partition": None}, "'partition'.*can't be None"),
    ({"enabled": "yes"}, "'enabled'.*can't be 'yes'"),
    ({"enabled": 1}, "'enabled'.*can't be 1"),
    ({"block_tokens": 0}, "'block_tokens'.*can't be 0"),
    ({"block_tokens": "32"}, "'block_tokens'.*can't be '32'"),
    ({"checkpoint_tokens": 1.5}, "'checkpoint_tokens'.*can't be 1.5"),
    ({"checkpoint_tokens": -512}, "'checkpoint_tokens'.*can't be -512"),
    ({"eviction": "oldest"}, "'eviction'.*can't be 'oldest': Input should be 'returns', 'lru'"),
    ({"queue": "lifo"}, "'queue'.*can't be 'lifo': Input should be 'fcfs' or 'hits-first'"),
    ({"host_memory": "64GiB"}, "'host_memory'.*can't be '64GiB'"),
    ({"host_memory": 0}, "'host_memory'.*can't be 0"),
    ({"allow": ["everything"]}, "can't be 'everything'"),
    ({"allow": "device"}, "'allow'.*can't be 'device'"),
    (
        {"checkpoint_states": "int4"},
        "'checkpoint_states'.*can't be 'int4': Input should be 'same', 'bfloat16' or 'int8'",
    ),
    ({"checkpoint_states": "int8", "partition": "fixed"}, "checkpoint_states 'int8' needs the elastic partition"),
    ({"kv": "tqkv-k5v4"}, r"'kv'.*can't be 'tqkv-k5v4': String should match pattern '\^tqkv-k"),
    ({"kv": 4}, "'kv'.*can't be 4"),
    ("elastic", "must be a table of settings, not 'elastic'"),
]


def test_every_setting_has_a_wrong_value_here() -> None:
    assert {key for given, _ in WRONG if isinstance(given, dict) for key in given} >= Settings.model_fields.keys()


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_settings_are_one_sentence(given: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        read_settings({"tidepool": given}, {})
    assert "\n" not in str(caught.value)


def test_wrong_switch_is_one_sentence() -> None:
    with pytest.raises(SettingsError, match="TIDEPOOL='on' isn't known; use one of elastic, fixed, off"):
        read_settings({}, {"TIDEPOOL": "on"})


def test_formats_are_those_of_tqkv() -> None:
    assert all(read_settings({"tidepool": {"kv": name}}, {}).kv == name for name in FORMATS)


def test_a_format_is_for_the_cpu_and_excludes_other_dtypes() -> None:
    check_kv(None, "cuda", "fp8")
    check_kv("tqkv-k4v4", "cpu", "auto")
    with pytest.raises(SettingsError, match="runs on the CPU only: on a GPU use --kv-cache-dtype turboquant_4bit_nc"):
        check_kv("tqkv-k4v4", "cuda", "auto")
    with pytest.raises(SettingsError, match="the KV cache dtype 'fp8' exclude each other"):
        check_kv("tqkv-k4v4", "cpu", "fp8")


def test_poison_switch() -> None:
    assert [poison_requested({"TIDEPOOL_POISON": value}) for value in ("", "0", "1")] == [False, False, True]
    assert not poison_requested({})
