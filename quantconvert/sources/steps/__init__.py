"""The registry of steps: a new one is a file and a line here."""

from __future__ import annotations

from quantconvert.registry import Registry
from quantconvert.sources.steps.base import Change, Step, StepContext, StepPlanner
from quantconvert.sources.steps.rotate import RotateStream, RotateValues

__all__ = ["STEPS", "Change", "Step", "StepContext", "StepPlanner"]

STEPS: Registry[StepPlanner] = Registry("step", RotateStream(), RotateValues())
