"""All malformed checkpoints: how each is made from a good one, and what the refusal says.

Found by thought, or by the fuzz. `says` must name the file or the folder; `{source}` stands for the folder.
"""

from __future__ import annotations

from tests.hostile.folders import CONFIGS, FILES, INDEXES
from tests.hostile.headers import HEADERS, SHARDS

CASES = [*HEADERS, *SHARDS, *INDEXES, *CONFIGS, *FILES]
