"""What a weight file is that is no weight file: by its first bytes, and what to do about it.

git-lfs pointer: git-lfs `docs/spec.md` ("version" comes first). The rest: each format's own magic bytes.
"""

from __future__ import annotations

from quantconvert.errors import CheckpointError
from quantconvert.text import quoted

SNIFFED_NBYTES = 64
_FETCH = "`git lfs pull` in a git clone, or `hf download` of the repository, fetches the weights themselves"
_AGAIN = "download this file again, signed in if the repository asks for it (`hf auth login`)"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", _FETCH),
    (b"GGUF", "a GGUF file, llama.cpp's own format", "give the checkpoint that it was made from, in safetensors"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with `gunzip`"),
    (b"BZh", "compressed by bzip2", "unpack it with `bunzip2`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with `unzstd`"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with `unxz`"),
)
_ZIP = (b"PK\x03\x04", "a zip archive", "unpack it; a file of torch.save has the name pytorch_model.bin")


def check_kind(head: bytes, file: str, nbytes: int) -> None:
    """Raise `CheckpointError` where `head`, the first bytes of `file` of `nbytes` bytes, are those of something else.

    A safetensors header of any length that is read has zeros among its first eight bytes, so that text is none.
    """
    is_torch = file.endswith(".bin")
    if nbytes == 0:
        raise CheckpointError(f"`{file}` is empty: expected weights, got 0 bytes", hint=_AGAIN)
    for magic, what, hint in _MAGIC if is_torch else (*_MAGIC, _ZIP):
        if head.startswith(magic):
            raise CheckpointError(f"`{file}` is {what}", hint=hint)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"`{file}` is a web page, not the weights", hint=_AGAIN)
    if not is_torch and len(head) >= 8 and head[:8].isascii() and head[:8].decode("ascii").isprintable():
        line = head.decode("utf-8", "replace").splitlines()[0]
        raise CheckpointError(f"`{file}` is text, not the weights: it begins with {quoted(line)}", hint=_AGAIN)
