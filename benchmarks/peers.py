"""Times other tools beside ours: CPU seconds and peak memory for the same checkpoint, int4 by groups of 128.

    python benchmarks/peers.py [--peers NAME,NAME] [--envs FOLDER] [--dir FOLDER] [--rounds 2]

Each tool has a virtual environment of its own, made here where it is missing. Tools take turns, so that all of them see
the same machine. CPU seconds and peak memory are the system's account of the finished process and its children.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from convert import measured  # noqa: E402


class Peer(NamedTuple):
    """packages: for pip. code: run with SOURCE and OUT as arguments. differs: from what ours does, in a few words."""

    packages: tuple[str, ...]
    code: str
    differs: str


PEERS: Mapping[str, Peer] = {
    "llm-compressor": Peer(
        ("torch==2.13.0", "llmcompressor"),
        "import sys\nfrom llmcompressor import model_free_ptq\n"
        "model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme='W4A16',"
        " ignore=['lm_head', 're:.*embed_tokens.*', 're:.*norm.*'], max_workers=2, device='cpu')",
        "model_free_ptq, W4A16, symmetric",
    ),
    "AutoRound": Peer(
        ("torch==2.13.0", "auto-round"),
        "import sys\nfrom auto_round.__main__ import run\n"
        "sys.argv[:] = ['auto-round', sys.argv[1], '--model_free', '--scheme', 'W4A16', '--output_dir', sys.argv[2]]\n"
        "run()",
        "--model_free, W4A16, symmetric",
    ),
    "mlx-lm": Peer(
        ("mlx[cpu]", "mlx-lm"),
        "import sys\nfrom mlx_lm import convert\n"
        "convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=128, q_bits=4)",
        "affine; embeddings and head are quantized too: 1.5 times the weights, half the bytes written",
    ),
}
OURS = {
    "ours": ("--format", "compressed-tensors"),
    "ours, --no-equalize": ("--format", "compressed-tensors", "--no-equalize"),
}


def environment(name: str, peer: Peer, envs: Path) -> Path:
    """The Python of a peer's environment, made and filled where it is missing."""
    python = envs / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(envs / name)], check=True)
        for package in peer.packages:  # torch first: what follows takes the build that is there
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def commands(args: argparse.Namespace, source: Path, out: Path) -> dict[str, list[str]]:
    """What is run for each tool."""
    found = {
        name: [sys.executable, "-m", "quantconvert", str(source), str(out), *options] for name, options in OURS.items()
    }
    for name in args.peers.split(","):
        python = environment(name, PEERS[name], args.envs)
        found[name] = [str(python), "-c", PEERS[name].code, str(source), str(out)]
    return found


def show(times: Mapping[str, Sequence[tuple[float, float, int]]]) -> None:
    """A table: minima over the rounds, and what they are of ours."""
    best = {name: tuple(min(column) for column in zip(*runs, strict=True)) for name, runs in times.items()}
    base = best["ours, --no-equalize"]
    print("| | wall s | CPU s | peak RSS MB | CPU / ours | memory / ours | |\n|---|---|---|---|---|---|---|")
    for name, (wall, cpu, rss) in best.items():
        differs = PEERS[name].differs if name in PEERS else ""
        ratios = f"{cpu / base[1]:.1f} | {rss / base[2]:.0f}"
        print(f"| {name} | {wall:.1f} | {cpu:.2f} | {rss / 1e6:.0f} | {ratios} | {differs} |")


def main() -> None:
    """Make what is missing, run all in turn, print minima."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--envs", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-peers")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-bench")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    source, out = args.dir / "dense-4", args.dir / "out"
    if not (source / "config.json").exists():
        subprocess.run([sys.executable, str(HERE / "checkpoints.py"), "dense", str(source)], check=True)
    for path in (HERE.parent / "examples" / "tiny-llama").glob("tokenizer*"):  # which some tools insist on
        shutil.copy(path, source)
    times: dict[str, list[tuple[float, float, int]]] = {}
    for _ in range(args.rounds):
        for name, command in commands(args, source, out).items():
            shutil.rmtree(out, ignore_errors=True)
            times.setdefault(name, []).append(measured(command))
            print(f"{name}: {times[name][-1]}", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    show(times)


if __name__ == "__main__":
    main()
