"""What was asked of the processes that make parts of a result: kept beside these, for the one that finishes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import LocalFolder, Repo
from quantconvert.errors import OutputError
from quantconvert.options import JobOptions, LimitOptions, SourceOptions, read_group

ASKED = "asked.json"
# What decides the result; limits, and what may be replaced, are for each command to say.
_KEPT = {**read_group(JobOptions), **read_group(SourceOptions)}.keys() - read_group(LimitOptions).keys()


@dataclass(frozen=True, slots=True)
class Asked:
    """A source, and options as `convert` takes them, in a spelling that does not depend on where the user stands."""

    source: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, source: str | os.PathLike[str], repo: Repo, values: Mapping[str, Any]) -> Asked:
        """From the checked values of a call, and what the source has turned out to be."""
        text = os.fspath(source)
        if isinstance(repo, LocalFolder) and repo.revision is None and "://" not in text:
            text = str(Path(text).expanduser().absolute())
        options = {name: value for name, value in values.items() if name in _KEPT}
        if "statistics" in options:
            options["statistics"] = str(Path(options["statistics"]).absolute())
        return cls(text, options)

    def content(self, revision: str | None) -> bytes:
        """As a file; `revision`: the commit that was found, which may have moved on when somebody reads this."""
        pinned = {**self.options, "revision": revision} if revision else self.options
        return json.dumps({"source": self.source, "options": pinned}, indent=1, default=str).encode()


def read_asked(staging: Path, out: Path) -> Asked:
    """What the parts in `staging` are of; raises `OutputError` where there are none."""
    try:
        found = json.loads((staging / ASKED).read_bytes())
        return Asked(str(found["source"]), dict(found["options"]))
    except FileNotFoundError:
        raise OutputError(
            f"nothing to finish: no part of `{out}` is in `{staging}`",
            hint="quantconvert SRC OUT --shards K/N makes a part; without --shards it makes all that is missing",
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"cannot read `{staging / ASKED}`: {error}", hint="the command of the parts without --shards finishes too"
        ) from error
