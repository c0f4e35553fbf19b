"""The pure half: from headers and a job to a complete plan. Imports no torch and touches no file.

Three moves: *decide* (one `Decision` a tensor: `decide.py` for a conversion, `transcode.py` for repacking and going
back), *lower* (a `Task` with its `Cut`), *place* (each `Output` in a `Shard`).
"""

from quantconvert.planning.build import build_plan, build_transcode
from quantconvert.planning.plan import Execution, Plan, Shard
from quantconvert.planning.tasks import Copy, Cut, Decode, Output, Quantize, Repack, Split, Task

__all__ = [
    "Copy", "Cut", "Decode", "Execution", "Output", "Plan", "Quantize", "Repack", "Shard", "Split", "Task",
    "build_plan", "build_transcode",
]  # fmt: skip
