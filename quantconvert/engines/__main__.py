"""`python -m quantconvert.engines` prints the README's tables of engines."""

from __future__ import annotations

from quantconvert.engines.tables import what_auto_writes, what_loads_where

print(f"{what_auto_writes()}\n{what_loads_where()}", end="")
