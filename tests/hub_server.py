"""A Hub on the loopback address that serves one folder, with just the endpoints huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny"


class HubHandler(BaseHTTPRequestHandler):
    """model_info, tree, HEAD and ranged GET of files, all of one repository at one commit.

    trouble: `whole` ignores Range, `other` answers another range, `short` leaves bytes out, `busy` answers the first
    two requests of each path with 503.
    """

    root: Path
    requests: list[tuple[str, str, int]]
    trouble: str | None
    asked: Counter[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def _tree(self, below: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": p.relative_to(self.root).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
            for p in self._files()
            if p.relative_to(self.root).as_posix().startswith(below)
        ]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """paths-info: the client sends a form, `paths=a&paths=b&expand=False`."""
        length = int(self.headers.get("Content-Length") or 0)
        asked = parse_qs(self.rfile.read(length).decode(), strict_parsing=True)
        self._json([entry for entry in self._tree("") if entry["path"] in asked["paths"]])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked[path] += 1
        if self.trouble == "busy" and self.asked[path] <= 2:
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.startswith(f"/api/models/{REPO}/tree/"):
            self._json(self._tree(path.removeprefix(f"/api/models/{REPO}/tree/").partition("/")[2]))
        elif path == f"/api/models/{REPO}" or path.startswith(f"/api/models/{REPO}/revision/"):
            files = [
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]} for entry in self._tree("")
            ]
            self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": files, "private": False})
        elif path.startswith(f"/{REPO}/resolve/"):
            self._file(self.root / path.removeprefix(f"/{REPO}/resolve/").partition("/")[2])
        else:
            self._json({"error": "Repository not found"}, 404)

    def _file(self, file: Path) -> None:
        data = file.read_bytes()
        begin, end, status = 0, len(data), 200
        asked = self.headers.get("Range")
        if asked and self.command == "GET" and self.trouble != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
            if self.trouble == "other":
                begin, end = begin + 1, end + 1
            elif self.trouble == "short":
                end -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.requests.append((file.name, "GET", end - begin))
            self.wfile.write(data[begin:end])


@contextmanager
def serve(root: Path, trouble: str | None = None) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """The endpoint, and the list of (file, method, bytes) that were fetched from it."""
    requests: list[tuple[str, str, int]] = []
    state = {"root": root, "requests": requests, "trouble": trouble, "asked": Counter()}
    handler = type("Handler", (HubHandler,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
