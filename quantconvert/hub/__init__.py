"""Repositories that are not on this machine: on the Hub, and behind other addresses by fsspec.

With `quantconvert.publish` the only import of huggingface_hub.
"""

from quantconvert.hub.opening import checked_repo, open_repo
from quantconvert.hub.reader import HubReader
from quantconvert.hub.repo import HubRepo
from quantconvert.hub.retry import WAITS, answered, is_unreachable, may_pass, reason_of, retried, status_of

__all__ = [
    "WAITS", "HubReader", "HubRepo", "answered", "checked_repo", "is_unreachable", "may_pass", "open_repo", "reason_of",
    "retried", "status_of",
]  # fmt: skip
