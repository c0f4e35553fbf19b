"""Sources that are not on this machine, and larger than its disk: ranges come when they are needed, and go."""

from quantconvert.run.spool.schedule import Schedule
from quantconvert.run.spool.spool import Hold, Spool, direct, holding
from quantconvert.run.spool.wants import Items, in_order, items_of_factors, items_of_reads, items_of_tasks

__all__ = [
    "Hold", "Items", "Schedule", "Spool", "direct", "holding", "in_order", "items_of_factors", "items_of_reads",
    "items_of_tasks",
]  # fmt: skip
