"""Tokens and control characters: whatever text they come in, they do not reach terminals, logs, reports or cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantconvert
from quantconvert import CheckpointError
from quantconvert.card import render_card
from quantconvert.text import clean, escaped_json, printable, quoted, redacted
from tests.hostile.build import good

TOKEN = "hf_" + "aB3dE6gH9" * 4
OTHER = "an-own-secret-0123"


def run(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantconvert", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=120)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN} is invalid", "token hf_*** is invalid"),
        (f"'{TOKEN}'", "'hf_***'"),
        (f"https://user:{TOKEN}@hub.example/a", "https://***@hub.example/a"),
        ("https://user:pass@hub.example/a/b", "https://***@hub.example/a/b"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***"),
        ("GET /x?a=1&X-Amz-Signature=0123abc&b=2", "GET /x?a=1&X-Amz-Signature=***&b=2"),
        ("https://cdn.example/x?Policy=ey0&Key-Pair-Id=K1", "https://cdn.example/x?Policy=***&Key-Pair-Id=***"),
        (f"sent {OTHER}!", "sent ***!"),
        ("`hf_quant_config.json` and hf_transfer", "`hf_quant_config.json` and hf_transfer"),
        ("https://huggingface.co/org/model@main", "https://huggingface.co/org/model@main"),
    ],
)
def test_redacted(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert redacted(text) == shown
    assert redacted(shown) == shown
    error = CheckpointError(text, hint=text)
    assert (error.message, error.hint, str(error)) == (shown, shown, f"{shown}\n\nhint: {shown}")


@pytest.mark.parametrize("text", ["?" + "token" * 100_000, ":/" * 300_000, "bearer " * 100_000, "hf_" * 300_000])
def test_redacting_a_megabyte_ends(text: str) -> None:
    assert redacted(text) == text


def test_printable() -> None:
    assert clean("a\x1b[2Jb\nc\td\x9be\u202ef\ud800\r") == "a\\x1b[2Jb\nc\\td\\x9be\\u202ef\\ud800\\r"
    assert printable("a\nb", newlines=False) == "a\\nb"
    assert printable("Zürich 模型 👍") == "Zürich 模型 👍"
    assert json.loads(escaped_json('{"a": "\x9b\ud800"}')) == {"a": "\x9b\ud800"}


def test_quoted() -> None:
    assert quoted("a\nb") == "`a\\nb`"
    assert quoted("x" * 121) == f"`{'x' * 120}...`"
    assert quoted("x" * 120) == f"`{'x' * 120}`"
    assert quoted([1, 2]) == "`[1, 2]`"
    assert quoted([[1] * 10**6]) == "`a list of 1`"
    assert quoted(10**5000) == "`a whole number of many digits`"


def test_the_command_line_repeats_no_token(tmp_path: Path) -> None:
    done = run(f"https://user:{TOKEN}@hub.example/org/model", str(tmp_path / "out"), HF_TOKEN=OTHER)
    assert done.returncode == 3
    assert "error: source `https://***@hub.example/org/model` is an address" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_card_and_report_hold_no_token(tmp_path: Path) -> None:
    source = good(tmp_path / "source")
    (source / "README.md").write_text(f"---\nlicense: mit\nnote: {TOKEN}\n---\nUse `token={TOKEN}`.\n")
    done = run(str(source), str(tmp_path / "out"), "--base-model", f"acme/{OTHER}", "--json", HF_TOKEN=OTHER)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (card, done.stdout, done.stderr):
        assert TOKEN not in text
        assert OTHER not in text
    assert "Use `token=hf_***`." in card
    assert "--base-model 'acme/***'" in card or "--base-model acme/***" in card
    assert "license: mit" in card


def test_a_library_that_repeats_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(f"401 for https://hub.example/x?token={TOKEN} with Bearer {TOKEN}\x1b[2J")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match="does not give it: 401 for") as info:
        quantconvert.plan("acme/tiny")
    assert TOKEN not in str(info.value)
    assert "\x1b" not in str(info.value)


@pytest.mark.parametrize(
    "words", [("plan", "."), ("plan", ".", "--verbose"), ("plan", ".", "--json"), ("inspect", ".")]
)
def test_a_folder_s_name_does_not_command_the_terminal(tmp_path: Path, words: tuple[str, ...]) -> None:
    source = good(tmp_path / "\x1b]0;title\x07\x9b2J")
    done = run(*(str(source) if word == "." else word for word in words))
    assert done.returncode == 0, done.stderr
    assert not any(c in done.stdout + done.stderr for c in "\x1b\x07\x9b")
    if "--json" in words:
        assert json.loads(done.stdout)["source"] == str(source)


def test_the_card_s_fence_holds_the_command(tmp_path: Path) -> None:
    made = quantconvert.plan(good(tmp_path / "source"), base_model="```\n# Injected\x1b[2J \udcff")
    card = render_card(made)
    command = "quantconvert SRC OUT --base-model '```\n# Injected\\x1b[2J \\udcff'"
    assert f"\n````bash\n{command}\n````\n" in card
    card.encode()
