"""Statistics of a model's inputs from use: transformers runs the model, hooks watch what its linear layers read."""

from quantconvert.observation.record import Observation, observe
from quantconvert.observation.request import Request

__all__ = ["Observation", "Request", "observe"]
