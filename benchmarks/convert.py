"""Times a conversion of a Llama-3.2-1B-shaped checkpoint (3.0 GB bfloat16, untied, 4 shards) against the floor.

    python benchmarks/convert.py [--dir FOLDER] [--format compressed-tensors] [--runs 3] [-- OPTIONS OF quantconvert]

`plain` is the same with `--no-equalize`. The floor is what nobody can avoid: reading the input's bytes and writing the
output's, measured in the same run. CPU seconds and peak memory are the kernel's own account of each finished process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, KV, HEADS = 2048, 8192, 16, 128256, 512, 32
CHUNK = 8 << 20


def make_checkpoint(folder: Path) -> None:
    """Random bfloat16 weights with the shapes and names of Llama-3.2-1B, and an lm_head of its own."""
    import torch
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    names, weight_map, count = list(shapes), {}, 4
    bounds = [len(names) * i // count for i in range(count + 1)]
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[bounds[i] : bounds[i + 1]]
        save_file(
            {name: (torch.randn(shapes[name]) * 0.02).to(torch.bfloat16) for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "tie_word_embeddings": False}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS * KV // HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def floor(source: Path, result: Path, scratch: Path) -> None:
    """Read every input byte into one buffer; write as many bytes as the result has, and sync them."""
    buffer = memoryview(bytearray(CHUNK))
    for path in weights_of(source):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in weights_of(result):
        with open(scratch / path.name, "wb", buffering=0) as file:
            left = path.stat().st_size
            while left:
                left -= file.write(buffer[: min(CHUNK, left)])
            os.fsync(file.fileno())
    shutil.rmtree(scratch)


def measured(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of one child process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    talk = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(talk.decode())
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Make the checkpoint where it is missing, then alternate floor and conversion, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--floor", nargs=3, metavar=("SRC", "OUT", "SCRATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.make:
        make_checkpoint(args.make)
        return
    if args.floor:
        source, result, scratch = map(Path, args.floor)
        scratch.mkdir(parents=True)
        floor(source, result, scratch)
        return
    source, out = args.dir / "llama-1b-shape", args.dir / "out"
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        # in a process of its own: a child's peak memory starts at its parent's
        subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
    options = [option for option in options if option != "--"]
    command = [sys.executable, "-m", "quantconvert", str(source), str(out), "--format", args.format, "--overwrite"]
    rows: dict[str, list[tuple[float, float, int]]] = {"convert": [], "plain": [], "floor": []}
    measured([*command, *options])  # warm: page cache, byte code
    for _ in range(args.runs):
        rows["plain"].append(measured([*command, *options, "--no-equalize"]))
        rows["convert"].append(measured([*command, *options]))
        floor_command = [sys.executable, __file__, "--floor", str(source), str(out), str(args.dir / "scratch")]
        rows["floor"].append(measured(floor_command))
    size_in = sum(path.stat().st_size for path in weights_of(source))
    size_out = sum(path.stat().st_size for path in weights_of(out))
    print(f"{size_in / 1e9:.2f} GB -> {size_out / 1e9:.2f} GB, {args.format} {' '.join(options)}".rstrip())
    print(f"cores: {len(os.sched_getaffinity(0))}")
    for name, runs in rows.items():
        wall, cpu, rss = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"{name:8} wall {wall:6.2f} s   CPU {cpu:6.2f} s   peak RSS {rss / 1e6:6.0f} MB   (median of {args.runs})"
        )
    for name in ("convert", "plain"):
        ratios = [c[1] / f[1] for c, f in zip(rows[name], rows["floor"], strict=True)]
        print(f"{name}: CPU seconds over the floor's {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
