"""The bytes of small tensors, for what planning has to look at: zero points, shapes."""

from __future__ import annotations

from collections.abc import Callable

from quantconvert.checkpoint.contents import Repo
from quantconvert.checkpoint.header import TensorRef
from quantconvert.errors import CheckpointError

MAX_SMALL_NBYTES = 64_000_000


def reader_of(repo: Repo) -> Callable[[TensorRef], bytes]:
    """Reads the bytes of a small tensor of `repo`; raises `CheckpointError` for one that is not."""

    def read(ref: TensorRef) -> bytes:
        if ref.nbytes > MAX_SMALL_NBYTES:
            raise CheckpointError(
                f"tensor `{ref.name}` in `{ref.file}` has {ref.nbytes} bytes: expected at most {MAX_SMALL_NBYTES}"
            )
        return repo.read(ref.file, ref.offset, ref.nbytes)

    return read
