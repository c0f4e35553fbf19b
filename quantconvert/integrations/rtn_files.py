"""What a checkpoint of the `rtn` layout holds, by its headers, and whether that is what its config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import safe_open

from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.layouts.simple import Simple
from quantconvert.schemes import Scheme

Header = tuple[str, tuple[int, ...]]  # dtype by safetensors' name, shape


def read_headers(files: Sequence[str] | None) -> dict[str, Header]:
    """Every tensor of these files by name."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise UnsupportedError("rtn is loaded from safetensors files only")
    found: dict[str, Header] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                view = reader.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


def is_quantized(header: Header) -> bool:
    """Whether this weight holds codes."""
    return header[0] in ("U8", "I8") and len(header[1]) == 2


def check(module: str, scheme: Scheme, tensors: Mapping[str, Header]) -> None:
    """The tensors of a quantized module must be just those that the format makes of its scheme."""
    stored_rows, columns = tensors[f"{module}.weight"][1]
    scale_dtype, scales = tensors.get(f"{module}.weight_scale", ("F32", ()))
    if scheme.group_size and columns % scheme.group_size:
        raise CheckpointError(f"`{module}.weight`: group_size {scheme.group_size} does not divide {columns}")
    rows = scales[0] if len(scales) == 2 else stored_rows * Simple().row_multiple(scheme)
    expected = {s.suffix: (s.dtype, s.shape) for s in Simple().outputs((rows, columns), scale_dtype, scheme)}
    for suffix in sorted(Simple.suffixes):
        promised, found = expected.get(suffix), tensors.get(f"{module}.{suffix}")
        if promised != found:
            raise CheckpointError(
                f"`{module}` is {scheme.label} by quantization_config: expected {suffix} {_says(promised)}, "
                f"got {_says(found)}"
            )


def _says(header: Header | None) -> str:
    return f"{header[0]} {list(header[1])}".strip() if header else "absent"
