"""Run launch.py's task as one rank of several, and print how often Python opened each weights file.

Arguments: overrides. The safetensors library opens files without Python's knowledge: what is counted is digests.
"""

import os
import sys
from collections import Counter

import launch
from tests.support.helpers import composed

if __name__ == "__main__":
    opened: Counter[str] = Counter()

    def noted(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened[os.path.basename(os.path.dirname(os.path.realpath(arguments[0])))] += 1

    sys.addaudithook(noted)
    launch.run_task(composed(*sys.argv[1:]))
    print(f"rank {os.environ['RANK']} opened {dict(sorted(opened.items()))}", flush=True)
