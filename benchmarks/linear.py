"""Times the rtn linear layers of `quantconvert.integrations` against torch's own, on the CPU or on a GPU.

    python benchmarks/linear.py [--device cuda] [--shape 2048x8192] [--tokens 1,16,256] [--runs 21] [--threads N]

`RtnLinear` dequantizes its weight in every call: it saves memory, not time. A line a shape (out x in), dtype and number
of tokens: the median milliseconds of `torch.nn.Linear`, and of int8 per channel and int4 by groups of 128 with zero
points as multiples of it. Layers take turns call by call, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantconvert.integrations.rtn_linear import RtnLinear
from quantconvert.schemes import Scheme

SHAPES = ("2048x2048", "8192x2048", "2048x8192")
SCHEMES = {"int8": Scheme(8, True, "channel"), "int4": Scheme(4, False, "group", 128)}


def layers(rows: int, columns: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """One of each kind, of random numbers."""
    linear = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
    found: dict[str, nn.Module] = {"linear": linear}
    for name, scheme in SCHEMES.items():
        layer = RtnLinear(linear, scheme)
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.fill_(0.01)
            else:
                info = torch.iinfo(parameter.dtype)
                parameter.copy_(torch.randint(info.min, info.max + 1, parameter.shape, device=device))
        found[name] = layer
    return found


def timed(call: Callable[[], Tensor], device: str) -> float:
    """Seconds of one call, the device's work included."""
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def medians(found: dict[str, nn.Module], x: Tensor, runs: int) -> dict[str, float]:
    """The median seconds of each layer, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for run in range(runs + 2):
        for name, layer in found.items():
            seconds = timed(lambda layer=layer: layer(x), x.device.type)  # type: ignore[misc]
            if run >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", action="append", help=f"out x in; repeatable [default: {', '.join(SHAPES)}]")
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.cuda.get_device_name() if asked.device == "cuda" else f"CPU, {asked.threads} threads"
    print(f"{device}, torch {torch.__version__}, median of {asked.runs} calls")
    print("| out x in | dtype | tokens | Linear ms | int8 | int4 |\n|---|---|---|---|---|---|")
    for shape in asked.shape or SHAPES:
        rows, columns = map(int, shape.split("x"))
        for dtype in (torch.bfloat16, torch.float32):
            found = layers(rows, columns, dtype, asked.device)
            for tokens in map(int, asked.tokens.split(",")):
                with torch.inference_mode():
                    x = torch.randn(tokens, columns, dtype=dtype, device=asked.device)
                    took = medians(found, x, asked.runs)
                ratios = " | ".join(f"{took[name] / took['linear']:.1f} x" for name in SCHEMES)
                name = str(dtype).removeprefix("torch.")
                print(f"| {shape} | {name} | {tokens} | {1000 * took['linear']:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
