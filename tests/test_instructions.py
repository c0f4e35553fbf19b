"""Instructions that the C kernel takes for each weight, as callgrind counts them: exact where seconds are not.

Valgrind knows no AVX-512, so that the level is x86-64-v3.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from quantconvert.kernels.native.fields import ALONG
from quantconvert.kernels.native.library import FILE, find_library

LIBRARY = find_library()
FOLDER = Path(__file__).parents[1] / "quantconvert" / "kernels" / "native"
LEVEL, COLUMNS = "x86-64-v3", 2048
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (shutil.which("valgrind") and shutil.which("cc")), reason="needs valgrind and cc"),
    pytest.mark.skipif(LIBRARY is None or LEVEL not in LIBRARY.levels, reason=f"needs the kernel at {LEVEL}"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program"
    source = Path(__file__).with_name("instructions.c")
    subprocess.run(["cc", "-O1", f"-I{FOLDER}", str(source), "-o", str(path), "-ldl"], check=True)
    return path


def counted(program: Path, rows: int, words: list[str], folder: Path) -> int:
    """Instructions of the whole program."""
    import quantconvert.kernels.native

    assert LIBRARY is not None
    library = Path(quantconvert.kernels.native.__file__).with_name(FILE)
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
    command = [*valgrind, str(program), str(library), str(LIBRARY.levels.index(LEVEL)), str(rows), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in (folder / "out").read_text().splitlines() if line.startswith("totals:"))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("num_bits", "symmetric", "along", "most"),
    [(4, 1, "columns", 7.0), (4, 0, "columns", 9.0), (4, 1, "rows", 9.0), (8, 1, "bytes", 7.0)],
)
def test_instructions_a_weight(num_bits: int, symmetric: int, along: str, most: float, program: Path, tmp_path: Path):
    """Of 128 rows more. Less than half of what is allowed would mean that they were not quantized."""
    words = [str(num_bits), str(symmetric), str(ALONG[along])]
    more = counted(program, 256, words, tmp_path) - counted(program, 128, words, tmp_path)
    found = more / (128 * COLUMNS)
    print(f"{found:.2f} instructions a weight")
    assert most / 2 < found < most
