"""What every encoding must say: which stored tensors are one weight, what reading it takes, and its rows.

Planning imports this package, so nothing here imports torch until a weight is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import QuantConvertError
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows


@dataclass(frozen=True, slots=True)
class Context:
    """What an encoding may look at. refs: stored tensors by name that no encoding before it took. block: the source's
    quantization_config; method: its name there. dtype: the model's float type, as a safetensors tag. read: the bytes
    of a small tensor. errors: where refusals are appended.
    """

    checkpoint: Checkpoint
    refs: Mapping[str, TensorRef]
    block: Mapping[str, Any]
    method: str | None
    dtype: str
    read: Callable[[TensorRef], bytes]
    errors: list[QuantConvertError]


class Encoding(Protocol):
    """A way in which weights are stored.

    name: as `Read.encoding` says it. methods: the words that config.json has for it (`quant_method`). out_first:
    whether weights are stored [out, in] so, whatever the family's plain ones are. by_rows: whether of the values of
    some rows the bytes of these are read and no others.
    """

    name: str
    out_first: bool
    by_rows: bool

    @property
    def methods(self) -> tuple[str, ...]: ...

    def find(self, context: Context) -> Iterable[Read]:
        """Every weight that is stored so; its stored tensors belong to no other."""
        ...

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """What reading takes; slab_nbytes: room for what has to be read ahead."""
        ...

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """The rows of a weight; what is needed throughout is read at once."""
        ...
