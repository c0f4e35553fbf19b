"""What exists: headers, configs and files of a source, checked before anything is decided."""

from quantconvert.checkpoint.contents import Checkpoint, Repo, RepoFile
from quantconvert.checkpoint.header import TensorRef
from quantconvert.checkpoint.load import load_checkpoint
from quantconvert.checkpoint.local import LocalFolder
from quantconvert.checkpoint.small import reader_of
from quantconvert.checkpoint.subfolder import open_subfolder

__all__ = [
    "Checkpoint", "LocalFolder", "Repo", "RepoFile", "TensorRef", "load_checkpoint", "open_subfolder", "reader_of",
]  # fmt: skip
