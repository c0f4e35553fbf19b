"""`plan` of DeepSeek-V3 on a Hub: its 92,000 tensors' headers over the loopback address, each request late by 20 ms.

    python benchmarks/hub.py [--latency MS]

Prints seconds, CPU seconds and requests of `plan`, and, of a conversion from Hub to Hub, what it would need at least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.deepseek import write_deepseek_v3

REPO, COMMIT = "acme/deepseek-v3", "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """One repository, its files by ranges, without redirects."""

    folder: Path
    late: float
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.late)
        path = urlsplit(self.path).path
        self.requests.append(path)
        if path.startswith("/api/"):
            siblings = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40}
                        for p in sorted(self.folder.iterdir())]  # fmt: skip
            return self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        file = self.folder / path.rpartition("/")[2]
        size = file.stat().st_size
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        with open(file, "rb") as stream:
            stream.seek(int(first))
            data = stream.read(int(last) + 1 - int(first))
        return self._send(data, f"bytes {first}-{int(first) + len(data) - 1}/{size}")

    def _send(self, data: bytes, part: str | None = None) -> None:
        self.send_response(206 if part else 200)
        self.send_header("Content-Length", str(len(data)))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(data)


def measure(endpoint: str, folder: Path, requests: list[str], *words: str) -> dict[str, object]:
    """One command: seconds, CPU seconds, requests, what it printed."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "quantconvert", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begun, "cpu": cpu, "requests": len(requests), "done": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=20.0, metavar="MS")
    late = parser.parse_args().latency / 1000
    with TemporaryDirectory() as name:
        folder, requests = Path(name), list[str]()
        write_deepseek_v3(folder / "in")
        state = {"folder": folder / "in", "late": late, "requests": requests}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Handler,), state))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = measure(endpoint, folder, requests, "plan", REPO, "--requantize", "--quiet")
        assert found["done"].returncode == 0, found["done"].stderr  # type: ignore[attr-defined]
        print(f"plan: {found['seconds']:.1f} s, {found['cpu']:.1f} CPU s, {found['requests']} requests")
        words = ("plan", REPO, "out", "--requantize", "--stream", "--disk-limit", "1GB")
        refused = measure(endpoint, folder, requests, *words)["done"].stderr  # type: ignore[attr-defined]
        print(" ".join(refused.split()))
        server.shutdown()


if __name__ == "__main__":
    main()
