"""One of several processes that do a list of runs, each with a process group of its own.

`python -m tests.support.many_runs FILE`; FILE holds [{"overrides": [...], "environment": {...}, "port": N}, ...]. A
run that fails ends the program with its error.
"""

import json
import os
import sys
from pathlib import Path

import launch
from tests.support.helpers import composed


def main() -> None:
    """Do the runs in their order."""
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ.update(run["environment"], MASTER_PORT=str(run["port"]))
        try:
            launch.run_task(composed(*run["overrides"]))
        except SystemExit as end:
            print(f"ended with {end.code}", flush=True)
        except BaseException:
            print(f"FAILED: {' '.join(run['overrides'])}", file=sys.stderr, flush=True)
            raise
        for name in run["environment"]:
            del os.environ[name]


if __name__ == "__main__":
    main()
