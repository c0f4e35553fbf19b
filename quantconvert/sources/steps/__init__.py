"""The registry of steps (fold, equalize, rotate): a new one is a file and a line here. There is none yet."""

from __future__ import annotations

from quantconvert.registry import Registry
from quantconvert.sources.steps.base import Change, Step, StepContext, StepPlanner

__all__ = ["STEPS", "Change", "Step", "StepContext", "StepPlanner"]

STEPS: Registry[StepPlanner] = Registry("step")
