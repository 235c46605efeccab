from __future__ import annotations

from typing import Any

import pytest

from tidepool.vllm_plugin.settings import Settings, SettingsError, poison_requested, read_settings


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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"partion": "fixed"}, "has no key 'partion'; it has enabled, partition"),
        ({"partition": "rubber"}, "'partition'.*can't be 'rubber'"),
        ({"enabled": "yes"}, "'enabled'.*can't be 'yes'"),
        ({"block_tokens": 0}, "'block_tokens'.*can't be 0"),
        ({"checkpoint_tokens": 1.5}, "'checkpoint_tokens'.*can't be 1.5"),
        ({"allow": ["everything"]}, "can't be 'everything'"),
        ("elastic", "must be a table of settings, not 'elastic'"),
    ],
)
def test_wrong_settings_are_one_sentence(given: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        read_settings({"tidepool": given}, {})
    assert "\n" not in str(caught.value)


def test_wrong_switch_is_one_sentence() -> None:
    with pytest.raises(SettingsError, match="TIDEPOOL='on' isn't known; use one of elastic, fixed, off"):
        read_settings({}, {"TIDEPOOL": "on"})


def test_poison_switch() -> None:
    assert [poison_requested({"TIDEPOOL_POISON": value}) for value in ("", "0", "1")] == [False, False, True]
    assert not poison_requested({})
