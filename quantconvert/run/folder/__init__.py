"""The output folder: what is refused before it is touched, its states on the disk, and the moves that end it."""

from quantconvert.run.folder.output import OutputFolder
from quantconvert.run.folder.preflight import (
    check_disk,
    check_output,
    check_place,
    check_unlocked,
    existing_parent,
    exists_error,
    free_nbytes,
    usable_nbytes,
)
from quantconvert.run.folder.signature import differences, identity
from quantconvert.run.folder.state import State, read_proof, read_state

__all__ = [
    "OutputFolder",
    "State",
    "check_disk",
    "check_output",
    "check_place",
    "check_unlocked",
    "differences",
    "existing_parent",
    "exists_error",
    "free_nbytes",
    "identity",
    "read_proof",
    "read_state",
    "usable_nbytes",
]
