"""What a process on another machine is told of a plan: options, where the source is, and the plan's digest.

It builds the plan itself, from headers, and refuses where that is another one: of millions of numbers nothing travels.
What no header says lies in the folder that both see.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex

from quantconvert.checkpoint import Repo
from quantconvert.errors import CheckpointError, OutputError, UnsupportedError
from quantconvert.job import Job
from quantconvert.planned import planned_again
from quantconvert.planning import Plan
from quantconvert.run.disk import write_file
from quantconvert.run.executors.base import Build
from quantconvert.run.folder.state import ORDER, read_object
from quantconvert.version import __version__

# The plan that this process has built, by run and digest: for the next tasks of the same run.
_BUILT: dict[tuple[str, str], Plan] = {}


@dataclass(frozen=True, slots=True)
class Order:
    """A `Build` in few words, for other processes. run: of the process that gives it, whose workers stop where another
    has taken the folder.
    """

    job: Job
    source: Repo
    folder: Path
    digest: str
    run: str
    version: str = __version__

    @classmethod
    def give(cls, build: Build) -> Order:
        """The order to carry out a plan; in the folder, what was found before planning."""
        plan, folder = build.plan, build.folder.absolute()
        job = replace(plan.job, workers=plan.execution.workers)  # which is else each machine's own number
        if plan.statistics is not None:
            job = replace(job, statistics=str(Path(plan.statistics.path).absolute()))
        order = cls(job, build.source, folder, plan.digest, token_hex(8))
        try:
            write_file(folder / ORDER, json.dumps({"run": order.run, "nonfinite": dict(plan.nonfinite)}).encode())
        except OSError as error:
            raise OutputError(f"cannot write in `{folder}`: {error.strerror}") from error
        return order

    def withdraw(self) -> None:
        """Whoever begins with it from now on is refused."""
        with suppress(OSError):
            (self.folder / ORDER).unlink()

    def build(self) -> Build:
        """The same build, in another process; raises what planning raises, `UnsupportedError` for another version,
        `CheckpointError` where the plan is another one, `OutputError` where the folder is none of this run.
        """
        if self.version != __version__:
            raise UnsupportedError(
                f"a machine of the cluster has quantconvert {__version__}: expected {self.version}",
                hint="install the same version on all machines",
            )
        beside = read_object(self.folder / ORDER)
        if beside is None or beside.get("run") != self.run:
            raise OutputError(
                f"`{self.folder}` is not there on a machine of the cluster, or of another run",
                hint="give an OUT that all machines see, and start no second conversion into it",
            )
        if (self.run, self.digest) not in _BUILT:
            plan = self._checked(planned_again(self.source, self.job, beside["nonfinite"]))
            _BUILT.clear()
            _BUILT[self.run, self.digest] = plan
        return Build(_BUILT[self.run, self.digest], self.source, self.folder)

    def _checked(self, plan: Plan) -> Plan:
        if plan.digest != self.digest:
            raise CheckpointError(
                f"a machine of the cluster plans another result from `{self.source.location}` (digest "
                f"{plan.digest[:12]}) than the one that asks it (digest {self.digest[:12]})",
                hint="the same source on all machines, into which nobody writes, and the same quantconvert",
            )
        return plan
