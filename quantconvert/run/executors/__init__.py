"""Ways to carry out the tasks of a plan, by name."""

from quantconvert.run.executors.base import EXECUTORS, Build, Executor, check_executor, get_executor

__all__ = ["EXECUTORS", "Build", "Executor", "check_executor", "get_executor"]
