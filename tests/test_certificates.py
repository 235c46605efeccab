"""Certificates as files: what they open, and what is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidepool import certificates
from tidepool.certificates import Setup, proven, read_all, withdraw, write
from tidepool.cli import app
from tidepool.verify.certify import certify
from tidepool.verify.messages import Counts, Outcome
from tidepool.verify.report import Row
from tidepool.verify.scenarios import FAR, Part
from tidepool.vllm_plugin.gates import unsupported_setup

SETUP = Setup(
    code="c0de",
    vllm="0.32.0",
    torch="2.13.0",
    kernels="triton 3.9.0",
    device="A card",
    capability="9.0",
    memory="81559 MiB",
    driver="570.1",
    runner="2",
    attention="FLASH_ATTN 3",
    states="GDN_ATTN triton",
    block="16",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    state_dtypes="bfloat16/float32",
    drafts="none",
    ranks="1 x 1",
    layouts="",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDEPOOL_CERTIFICATES", str(tmp_path / "certificates"))
    return tmp_path / "certificates"


def reason_for(setup: Setup, allow: tuple[str, ...] = (), **asked: bool) -> str | None:
    return unsupported_setup(setup, proven(), "tidepool verify", allow, **asked)


def test_what_a_certificate_covers_is_served() -> None:
    assert "To verify this machine and make one, run: tidepool verify" in str(reason_for(SETUP))
    write(SETUP, "tidepool verify")
    assert reason_for(SETUP) is None


@pytest.mark.parametrize("field", Setup._fields)
def test_nothing_beyond_its_setup_is(field: str) -> None:
    """Another vLLM, card, driver, backend, dtype, number of drafts or ranks: any field."""
    write(SETUP, "tidepool verify")
    other = SETUP._replace(**{field: "another"})
    assert f"(the nearest is for another {field})" in str(reason_for(other))


def test_what_is_allowed_is_served_without() -> None:
    assert reason_for(SETUP, ("device",)) is None
    assert str(reason_for(SETUP, ("device",), drafts=True)).startswith("drafts: no certificate covers")
    assert reason_for(SETUP, ("device", "drafts"), drafts=True) is None
    assert str(reason_for(SETUP, ("device",), host_memory=True)).startswith("host-memory: no certificate covers")
    assert reason_for(SETUP, ("device", "host-memory"), host_memory=True) is None
    write(SETUP, "tidepool verify")
    assert reason_for(SETUP, drafts=True, host_memory=True) is None


@pytest.mark.parametrize("harm", ["cut", "edited", "empty", "renamed", "no table", "a field less", "not text"])
def test_a_damaged_or_forged_file_is_none(harm: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = SETUP._replace(vllm="0.31.0")
    path = write(other if harm in ("edited", "renamed") else SETUP, "tidepool verify")
    text = path.read_text()
    if harm == "edited":
        text = text.replace("0.31.0", "0.32.0")
    elif harm == "a field less":
        text = text.replace('"driver": "570.1",', "")
    path.write_text({"cut": text[: len(text) // 2], "empty": "", "no table": "[]", "not text": "\x00"}.get(harm, text))
    if harm in ("edited", "renamed"):
        path.rename(path.with_name(write(SETUP, "").name))
    logging.getLogger("vllm.tidepool").propagate = True
    assert proven() == ()
    assert len([record for record in caplog.records if "ignores the certificate" in record.message]) == 1
    assert reason_for(SETUP) is not None


def test_a_folder_that_is_not_there_has_none(folder: Path) -> None:
    assert not folder.exists()
    assert proven() == ()


def test_any_changed_file_of_tidepool_is_another_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    monkeypatch.setattr(certificates, "__file__", str(package / "certificates.py"))
    hashes = []
    for name, content in [("a.py", "1"), ("a.py", "2"), ("part/b.py", "2"), ("part/b.pyc", "2")]:
        (package / name).write_text(content)
        hashes.append(certificates.code_hash.__wrapped__())
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3], "compiled files come and go"


def row(setup: Setup, problems: tuple[str, ...] = ()) -> Row:
    return Row(Part(FAR, "elastic"), Outcome({}, Counts(), {}, setup, 0.0, 1.0), 0, problems)


def test_a_verification_that_holds_certifies_and_one_that_does_not_withdraws() -> None:
    other = SETUP._replace(states="MAMBA2_ATTN triton")
    write(other, "tidepool verify")
    (line,) = certify([row(SETUP), row(SETUP)], True, "tidepool verify")
    assert "A card, driver 570.1; vLLM 0.32.0; FLASH_ATTN 3" in line
    assert set(proven()) == {SETUP, other}
    assert list(certify([row(SETUP)], False, "tidepool verify")) == []
    assert proven() == (other,)
    withdraw(SETUP)


def test_engines_that_were_not_alike_prove_nothing() -> None:
    (line,) = certify([row(SETUP), row(SETUP._replace(attention="TRITON_ATTN"))], True, "tidepool verify")
    assert line == "No certificate: the engines with GDN_ATTN triton differed in attention."
    assert proven() == ()


def test_list(folder: Path) -> None:
    write(SETUP, "tidepool verify --tp 2")
    (folder / "other.json").write_text("{")
    result = CliRunner().invoke(app, ["verify", "--list"])
    assert result.exit_code == 0
    assert "by tidepool verify --tp 2; of another version of tidepool" in result.output
    assert "other.json: no certificate, it can't be read" in result.output
    assert str(folder) in result.output
    assert len(read_all()) == 2


def test_a_certificate_is_small_json() -> None:
    content = json.loads(write(SETUP, "tidepool verify").read_text())
    assert content["setup"] == SETUP._asdict()
    assert set(content) == {"setup", "tidepool", "made", "command", "digest"}
