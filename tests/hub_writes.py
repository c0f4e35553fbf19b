"""A Hub on the loopback address that takes what huggingface_hub writes: branches, large files, commits, pull requests.

Only what the client asks, in the words of its own source (huggingface_hub 2.4). Large files go to another origin, which
answers 400 to a token. `faults`: path patterns to what goes wrong with the first request of each.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_files import SOURCE, Files, send_located, send_range, send_resolved

TOKEN = "hf_secret_token_for_the_test"
REPO = "me/model-int4"
LARGE = 1000  # bytes from which a file is a large one


@dataclass
class State:
    """One repository: its branches, each from path to sha256 of a blob or, of small files, to their bytes."""

    branches: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)  # sums of blobs, each time that one was taken
    pulls: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    tokens_elsewhere: int = 0
    seen: list[frozenset[str]] = field(default_factory=list)
    cdn: str = ""
    hub: str = ""
    files: Files | None = None  # a repository to read from
    cas: Path | None = None  # where hf_xet keeps what is uploaded, itself
    stop_after: int | None = None  # requests, after which every other hangs until it is told
    hanging: threading.Event = field(default_factory=threading.Event)

    def content(self, branch: str = "main") -> dict[str, bytes]:
        return {
            path: value if isinstance(value, bytes) else self.blobs[value]
            for path, value in self.branches[branch].items()
        }

    def moved(self, branch: str) -> str:
        count = len(self.log)
        self.heads[branch] = hashlib.sha1(f"{branch}{count}".encode()).hexdigest()
        return self.heads[branch]


def git_sum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    state: State
    is_cdn = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, value: object = None, status: int = 200, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self) -> None:
        state, path = self.state, unquote(urlsplit(self.path).path)
        body = self.body()
        state.log.append((self.command, path))
        if state.stop_after is not None and len(state.log) > state.stop_after:
            state.hanging.set()
            return None
        if self.is_cdn and state.files and self.command == "GET":
            return send_located(self, state.files)
        if self.is_cdn:
            return self.put_blob(path, body)
        fault = next((key for key in state.faults if key in path), None)
        if fault is not None:
            return self.answer({"error": "trouble"}, state.faults.pop(fault), Retry_After="0")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid token"}, 401)
        self.route(path, body)
        if "main" in state.branches:
            state.seen.append(frozenset(state.branches["main"]))
        return None

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

    def put_blob(self, path: str, body: bytes) -> None:
        if self.headers.get("Authorization"):
            self.state.tokens_elsewhere += 1
            return self.answer({"error": "no tokens here"}, 400)
        oid = path.removeprefix("/blob/")
        if hashlib.sha256(body).hexdigest() != oid:  # of a client that was killed
            return self.answer({"error": "another content"}, 400)
        self.state.blobs[oid] = body
        self.state.stored.append(path)
        return self.answer({}, ETag='"x"')

    def route(self, path: str, body: bytes) -> None:
        state, api = self.state, f"/api/models/{REPO}"
        if state.files and SOURCE in path:
            if path.startswith("/api/"):
                return self.answer(state.files.tree() if "/tree/" in path else state.files.info())
            return send_resolved(self, state.files, path.partition("/resolve/")[2].partition("/")[2])
        if path.startswith(f"/{REPO}/resolve/"):
            revision, _, name = path.partition("/resolve/")[2].partition("/")
            return self.whole(revision, name)
        if path == "/api/repos/create":
            if state.branches:
                return self.answer({"error": "exists", "url": f"{state.hub}/{REPO}"}, 409)
            state.branches["main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            state.moved("main")
            return self.answer({"url": f"{state.hub}/{REPO}"})
        if not state.branches or (not path.startswith((api, f"/{REPO}.git")) and path != "/api/validate-yaml"):
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"objects": [self.offer(o) for o in json.loads(body)["objects"]]})
        words = path.removeprefix(api).strip("/").split("/")
        return self.answer_of(words, body)

    def offer(self, wanted: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.state.blobs:
            return found
        return found | {"actions": {"upload": {"href": f"{self.state.cdn}/blob/{wanted['oid']}"}}}

    def answer_of(self, words: list[str], body: bytes) -> None:
        state = self.state
        match words:
            case [""] | ["revision", _]:
                branch = words[1] if len(words) > 1 else "main"
                if branch not in state.branches:
                    return self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
                siblings = [
                    {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
                    | ({"lfs": e["lfs"] | {"sha256": e["oid"]}} if "lfs" in e else {})
                    for e in self.entries(branch)
                ]
                return self.answer({"id": REPO, "sha": state.heads[branch], "private": False, "siblings": siblings})
            case ["refs"]:
                refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head}
                        for name, head in state.heads.items()]  # fmt: skip
                return self.answer({"branches": refs, "tags": [], "converts": [], "pullRequests": []})
            case ["branch", name]:
                return self.branch(name, body)
            case ["tree", revision, *_]:
                return self.answer(self.entries(revision))
            case ["paths-info", revision]:
                asked = parse_qs(body.decode())["paths"]
                return self.answer([entry for entry in self.entries(revision) if entry["path"] in asked])
            case ["xet-write-token", _] if state.cas:
                told = {"casUrl": f"local://{state.cas}", "accessToken": "xet", "exp": 9_999_999_999}
                names = {
                    "X_Xet_Cas_Url": "casUrl",
                    "X_Xet_Access_Token": "accessToken",
                    "X_Xet_Token_Expiration": "exp",
                }
                headers: dict[str, Any] = {name: str(told[key]) for name, key in names.items()}
                return self.answer(told, **headers)
            case ["preupload", _]:
                files = json.loads(body)["files"]
                there = {entry["path"]: entry["oid"] for entry in self.entries(words[1])}
                modes = [
                    {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
                    | ({"oid": there[f["path"]]} if f["path"] in there else {})
                    for f in files
                ]
                return self.answer({"files": modes})
            case ["commit", revision]:
                return self.commit(revision, body)
        return self.answer({"error": "not served"}, 404)

    def whole(self, revision: str, name: str) -> None:
        """A file of the repository, or a range of it."""
        branch = next((name for name, head in self.state.heads.items() if head == revision), revision)
        send_range(self, self.state.content(branch)[name], commit=self.state.heads[branch])

    def branch(self, name: str, body: bytes) -> None:
        state = self.state
        if self.command == "DELETE":
            del state.branches[name], state.heads[name]
            return self.answer({})
        if name in state.branches:
            return self.answer({"error": "exists"}, 409)
        state.branches[name] = dict(state.branches["main"])
        state.moved(name)
        return self.answer({})

    def entries(self, revision: str) -> list[dict[str, Any]]:
        branch = next((name for name, head in self.state.heads.items() if head == revision), revision)
        return [
            {"type": "file", "path": path, "size": len(self.state.content(branch)[path])}
            | ({"oid": git_sum(value)} if isinstance(value, bytes) else {"oid": value, "lfs": self.lfs(value)})
            for path, value in self.state.branches[branch].items()
        ]

    def lfs(self, oid: str) -> dict[str, Any]:
        return {"oid": oid, "size": len(self.state.blobs[oid]), "pointerSize": 134}

    def commit(self, revision: str, body: bytes) -> None:
        state, lines = self.state, [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, state.heads[revision]):
            return self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(state.branches[revision])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if state.cas:
                    state.blobs[value["oid"]] = bytes(value.get("size", LARGE))  # in its place: the content is hf_xet's
                if value["oid"] not in state.blobs:
                    return self.answer({"error": "no such object"}, 400)
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        if "create_pr=1" in urlsplit(self.path).query:
            state.pulls.append(files)
            url = f"{state.hub}/{REPO}/discussions/{len(state.pulls)}"
            return self.answer(
                {"commitUrl": f"{state.hub}/{REPO}/commit/{'p' * 40}", "commitOid": "p" * 40, "pullRequestUrl": url}
            )
        state.branches[revision] = files
        oid = state.moved(revision)
        if f"lost {revision}" in state.faults:
            del state.faults[f"lost {revision}"]
            return None  # the connection ends without an answer
        return self.answer({"commitUrl": f"{state.hub}/{REPO}/commit/{oid}", "commitOid": oid})


@contextmanager
def serve_writes(source: Path | None = None) -> Iterator[tuple[str, State]]:
    """The endpoint of an account without repositories, and what it holds. source: beside it, `hub_files.SOURCE`."""
    state = State(files=Files(source) if source else None)
    cdn = ThreadingHTTPServer(("127.0.0.1", 0), type("Cdn", (Handler,), {"state": state, "is_cdn": True}))
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Handler,), {"state": state}))
    state.cdn, state.hub = (f"http://127.0.0.1:{server.server_port}" for server in (cdn, hub))
    if state.files:
        state.files.cdn = state.cdn
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in (cdn, hub)]
    for thread in threads:
        thread.start()
    try:
        yield state.hub, state
    finally:
        for server, thread in zip((cdn, hub), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
