"""Text from outside, made fit for people: no control characters, no tokens, no endless values.

Names, configs and other programs' messages reach terminals, logs and model cards; `clean` is the one place that every
error message passes, `quoted` is for a single value inside one.
"""

from __future__ import annotations

import os
import re

MAX_QUOTED = 120
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HF_API_TOKEN")
_SECRET_KEYS = "(?:token|signature|credential|secret|key|policy)"
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<![A-Za-z0-9])(hf|api_org|hf_oauth)_[A-Za-z0-9]{16,}"), r"\1_***"),
    (re.compile(r"(:/{1,2})[^/\s@\"'`]+@"), r"\1***@"),  # one slash: what a path makes of a URL
    (re.compile(r"(?i)\b(bearer|basic) +[A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
    (re.compile(rf"(?i)([?&][\w-]{{0,40}}{_SECRET_KEYS}[\w-]{{0,40}}=)[^&\s\"'`]+"), r"\1***"),
)  # fmt: skip


def redacted(text: str) -> str:
    """`text` without Hub tokens, passwords in URLs, signatures of signed URLs, and the environment's own token."""
    for variable in _TOKEN_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def is_plain(name: str) -> bool:
    """Whether a name holds no control characters, line ends or halves of surrogate pairs (which UTF-8 cannot hold)."""
    return _CONTROLS.search(name) is None


def printable(text: str, newlines: bool = True) -> str:
    """`text` with every character that could command a terminal written as an escape such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or (newlines and c == "\n") else c.encode("unicode_escape").decode() for c in text
    )


def escaped_json(text: str) -> str:
    """JSON text with its control characters, line ends between values excepted, as escapes."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def clean(text: str) -> str:
    """A whole message: printable, newlines kept, and without tokens."""
    return redacted(printable(text))


def one_line(text: str) -> str:
    """`clean`, for a cell or a label: line ends are escapes too."""
    return redacted(printable(text, newlines=False))


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """A value from outside on one line, in backticks, only its beginning when it is long."""
    text = value[: limit + 1] if isinstance(value, str) else _short(value, limit)
    shown = printable(text[:limit], newlines=False)
    return f"`{shown}...`" if len(text) > limit else f"`{shown}`"


def _short(value: object, limit: int) -> str:
    """The beginning of `str(value)`, without writing out what a container of millions holds."""
    if isinstance(value, (list, dict)) and (len(value) > 8 or not all(type(v) is int for v in value)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return "a whole number of many digits"
    return str(value)


def size(nbytes: float) -> str:
    """Decimal, three figures: `1.55 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}" if nbytes < 999.5 * factor else f"{nbytes / factor:.0f} {unit}"
    return f"{nbytes:.0f} B"


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`0.84 s`, `12.3 s`, `4 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
