"""What has to be set before the first test module imports torch."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: a pool of threads in each would only get in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
