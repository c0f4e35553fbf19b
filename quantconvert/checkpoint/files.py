"""Which files of a model repository are weights, duplicates of the weights, or side files that travel along."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Literal

from quantconvert.checkpoint.contents import RepoFile
from quantconvert.errors import CheckpointError, QuantConvertError, raise_all
from quantconvert.text import is_plain, quoted

# The picture that our cards show.
PICTURE = "quantconvert.svg"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TORCH_INDEX_NAME, TORCH_NAME = "pytorch_model.bin.index.json", "pytorch_model.bin"
PIPELINE_NAME = "model_index.json"  # of diffusers
STATE_FOLDER = ".quantconvert"
MAX_FILES = 10_000
MAX_REPORTED = 10  # of problems of one kind: more tell nothing new

FileKind = Literal["side", "rewritten", "duplicate", "hidden"]

_REWRITTEN = {"config.json", "README.md", INDEX_NAME}
# Weights in another form, or configs of another quantizer: copied, they would shadow what we write (vLLM prefers
# `consolidated*` over the index, transformers prefers `model.safetensors`).
_DUPLICATES = (
    "*.safetensors.index.json", "consolidated*", "params.json", "pytorch_model*", "model*.bin", "*.bin.index.json",
    "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite",
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantconvert.json", PICTURE,
)  # fmt: skip
_DUPLICATE_FOLDERS = {"original", "metal", "onnx", "openvino", "flax", "tf", "gguf", "coreml"}


# What belongs to a checkpoint and would be taken for a part of the one that replaces it.
_STALE = (
    "*.safetensors", INDEX_NAME, "consolidated*", "params.json", "pytorch_model*", "hf_quant_config.json",
    "quantize_config.json", "quant_config.json", "quantconvert.json", "quantconvert.factors", PICTURE, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "modeling_*.py",
    "configuration_*.py", "tokenization_*.py", "processing_*.py",
)  # fmt: skip


def is_stale(path: str) -> bool:
    """Whether `--overwrite` removes an old file that the new checkpoint does not have; the user's own files stay."""
    return "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in _STALE)


def kind_of(path: str) -> FileKind:
    """What to do with the repository file `path` (relative, `/`-separated): carried over, rewritten, or left behind.

    Safetensors files at the top level that are not part of the checkpoint count as duplicates; in sub-folders they
    belong to another component (a pooling head, an adapter) and are carried over.
    """
    parts = path.split("/")
    name = parts[-1]
    if any(part.startswith(".") and part not in (".gitattributes",) for part in parts):
        return "hidden"
    if path in _REWRITTEN:
        return "rewritten"
    if parts[0] in _DUPLICATE_FOLDERS and len(parts) > 1:
        return "duplicate"
    if len(parts) == 1 and name.endswith(".safetensors"):
        return "duplicate"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _DUPLICATES):
        return "duplicate"
    return "side"


def is_pipeline(files: Iterable[RepoFile]) -> bool:
    """Whether they are a pipeline's, and no checkpoint's."""
    names = {file.path for file in files}
    return PIPELINE_NAME in names and "config.json" not in names


def check_files(files: Iterable[RepoFile], location: str) -> dict[str, RepoFile]:
    """The repository's files by path; raises for a name that leaves the folder or commands a terminal.

    For folders as for the Hub, whose answers name files too: each may become a file of the result.
    """
    errors: list[QuantConvertError] = []
    found: dict[str, RepoFile] = {}
    for file in files:
        parts = file.path.split("/")
        if not is_plain(file.path):
            errors.append(CheckpointError(f"{quoted(file.path)} of `{location}` has control characters in its name"))
        elif "\\" in file.path or any(part in ("", ".", "..") for part in parts):
            errors.append(CheckpointError(f"{quoted(file.path)} of `{location}` is no path inside it"))
        found[file.path] = file
        if len(errors) == MAX_REPORTED or len(found) > MAX_FILES:
            break
    raise_all(errors)
    if len(found) > MAX_FILES:
        raise CheckpointError(f"source `{location}` has more than {MAX_FILES} files: expected one model")
    return found
