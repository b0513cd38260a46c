"""What has to be set before the first test module imports torch, and once all of them are imported."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: a pool of threads in each would only get in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Let garbage collection pass over the libraries: a tenth of the tests' time went through them again and again."""
    gc.collect()
    gc.freeze()
