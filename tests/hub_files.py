"""The reading half of a Hub on the loopback address: one repository whose large files lie at another origin.

In the words of the client's own source (huggingface_hub 2.4): `/resolve/` answers 302 with a signed location and the
sha256 as `X-Linked-Etag`, the location answers ranges, and 400 to a token. What goes wrong says `Files.trouble`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

SOURCE = "acme/big"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file is a large one


@dataclass
class Files:
    """A folder as the repository `SOURCE`.

    trouble: kinds of fault, each of which happens once, at the next request that it fits. ranges: every answered range
    of a large file, as (file, begin, end).
    """

    folder: Path
    cdn: str = ""
    trouble: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    redirects: int = 0
    gated: bool = False
    tokens_elsewhere: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, *kinds: str) -> str | None:
        """One of the faults, if it is to happen."""
        with self.lock:
            kind = next((kind for kind in self.trouble if kind in kinds), None)
            if kind:
                self.trouble.remove(kind)
            return kind

    def info(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                data, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
                entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                if len(data) >= LARGE:
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
        return {"id": SOURCE, "sha": COMMIT, "private": False, "siblings": siblings}

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]}
            | ({"lfs": {"oid": s["lfs"]["sha256"], "size": s["size"], "pointerSize": 134}} if "lfs" in s else {})
            for s in self.info()["siblings"]  # type: ignore[attr-defined]
        ]


def send_resolved(handler: BaseHTTPRequestHandler, files: Files, path: str) -> None:
    """`/resolve/`: a small file itself, of a large one where it lies."""
    data = (files.folder / path).read_bytes()
    if files.gated:
        handler.send_response(403)
        handler.send_header("X-Error-Code", "GatedRepo")
        handler.send_header("X-Error-Message", "Access to this model is restricted")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()
    if len(data) < LARGE:
        return _send(handler, files, path, data)
    sum_ = hashlib.sha256(data).hexdigest()
    files.redirects += 1
    handler.send_response(302)
    handler.send_header("Location", f"{files.cdn}/file/{path}?signed={files.redirects}")
    handler.send_header("X-Linked-Etag", '"' + ("f" * 64 if files.take("etag") else sum_) + '"')
    handler.send_header("X-Linked-Size", str(len(data)))
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
    return None


def send_located(handler: BaseHTTPRequestHandler, files: Files) -> None:
    """What the location answers."""
    path = urlsplit(handler.path).path.removeprefix("/file/")
    if handler.headers.get("Authorization"):
        files.tokens_elsewhere += 1
        return _status(handler, 400)
    kind = files.take("500", "503", "429", "401", "expired")
    if kind:
        return _status(handler, {"expired": 403}.get(kind) or int(kind))
    return _send(handler, files, path, (files.folder / path).read_bytes())


def _status(handler: BaseHTTPRequestHandler, status: int) -> None:
    handler.send_response(status)
    handler.send_header("Retry-After", "0")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _send(handler: BaseHTTPRequestHandler, files: Files, path: str, data: bytes) -> None:
    kind = files.take("cut", "short", "ignored", "size", "slow") if len(data) >= LARGE else None
    begin, end = send_range(handler, data, kind)
    if len(data) >= LARGE and handler.command == "GET":
        files.ranges.append((path, begin, end))


def send_range(
    handler: BaseHTTPRequestHandler, data: bytes, kind: str | None = None, commit: str = COMMIT
) -> tuple[int, int]:
    """The range that is asked for, or all; what was sent. kind: what goes wrong with it."""
    begin, end, status, total = 0, len(data), 200, len(data)
    asked = handler.headers.get("Range")
    if asked and kind != "ignored" and handler.command == "GET":
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
    body = data[begin:end]
    if kind == "short":
        body = body[: len(body) // 2]
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    if status == 206:
        handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total + (kind == 'size')}")
    handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
    handler.send_header("X-Repo-Commit", commit)
    handler.end_headers()
    if kind == "slow":
        time.sleep(1.5)  # longer than the client waits in that test
    with suppress(OSError):
        if handler.command != "HEAD":
            handler.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
    return begin, begin + len(body)
