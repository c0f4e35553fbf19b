"""What `verify` says of llm-compressor's checkpoints of `examples/tiny-llama`, and whether their codes are the nearest.

    python benchmarks/foreign.py [--envs FOLDER]

llm-compressor (`model_free_ptq`) runs in an environment of its own, made where it is missing (`benchmarks/peers.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import quantconvert

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from peers import PEERS, environment  # noqa: E402

SOURCE = HERE.parent / "examples" / "tiny-llama"
SCHEMES = ("W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
CODE = (
    "import sys\nfrom llmcompressor import model_free_ptq\n"
    "model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[3],"
    " ignore=['lm_head', 'model.embed_tokens'], max_workers=1, device='cpu')"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--envs", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-peers")
    python = environment("llm-compressor", PEERS["llm-compressor"], parser.parse_args().envs)
    print("| scheme | result | worst SQNR dB | verdicts |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for scheme in SCHEMES:
            out, statement = Path(work) / scheme, Path(work) / f"{scheme}.json"
            command = [str(python), "-c", CODE, str(SOURCE), str(out), scheme]
            subprocess.run(command, check=True, capture_output=True)
            found = quantconvert.verify(out, SOURCE, attest=str(statement))
            worst = min(error.sqnr for error in found.errors if error.sqnr is not None)
            weights = json.loads(statement.read_text())["predicate"]["verdict"]["weights"] if found.is_ok else {}
            kinds = Counter(weight["verdict"].split(":")[0] for weight in weights.values())
            said = ", ".join(f"{count}: {kind}" for kind, count in kinds.items())
            print(f"| {scheme} | {'ok' if found.is_ok else found.failed} | {worst} | {said} |", flush=True)


if __name__ == "__main__":
    main()
