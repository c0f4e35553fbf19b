"""The process: streams and signals first, then the program.

Nothing heavy is imported at the top: a Ctrl-C while the program's own modules are imported ends it as any other does.
"""

from __future__ import annotations

import gc
import sys


def run() -> None:
    """The console script."""
    # Modules and plans are many values without cycles; looking for those takes a tenth of the time. What runs long asks
    # for it again.
    gc.disable()
    from quantconvert.cli.signals import IMPORTING, take_signals
    from quantconvert.cli.streams import mend_streams

    take_signals(IMPORTING)
    mend_streams()
    from quantconvert.cli.main import main

    sys.exit(main())
