"""The program `ultraflux`: a stage that the launcher above can fork, or the command line.

Below a pipeline run `ultraflux stage run NAME` begins in milliseconds: nothing is imported here
that is not needed to ask for the fork (flows/running/stage_forks.py).
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point."""
    _import_from(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if sys.argv[1:3] == ["stage", "run"]:
        from flows.running.stage_forks import ask_launcher

        code = ask_launcher([sys.executable, *sys.argv])
        if code is not None:
            _end(code)
    from flows import cli

    cli.main()


def _import_from(code: str) -> None:
    """Look for modules beside this package first.

    PYTHONPATH stands before what is installed, and the `components` or `flows` of another project
    on it would be imported as ours.
    """
    if not os.environ.get("PYTHONPATH"):
        return
    sys.path.insert(0, code)
    found = sys.modules.get("flows")
    # Another `flows` that lacks this module lets the search go on to ours.
    if found is not None and found.__path__[0] != os.path.join(code, "flows"):
        del sys.modules["flows"]


def _end(code: int) -> None:
    """End as the stage did, also where a signal ended it."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
