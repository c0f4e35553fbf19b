"""The pure half: from headers and a job to a complete plan. Imports no torch and touches no file."""

from quantconvert.planning.build import build_plan
from quantconvert.planning.plan import Execution, Output, Plan, Shard, Task

__all__ = ["Execution", "Output", "Plan", "Shard", "Task", "build_plan"]
