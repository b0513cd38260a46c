"""Run launch.py's task as one rank of several, and print how often a model's from_pretrained was called.

Arguments: overrides.
"""

import os
import sys

from transformers import PreTrainedModel

import launch
from tests.support.helpers import composed

if __name__ == "__main__":
    calls = 0
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        global calls
        calls += 1
        return original(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(counted)
    launch.run_task(composed(*sys.argv[1:]))
    print(f"rank {os.environ['RANK']} read {calls} models", flush=True)
