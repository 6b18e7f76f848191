"""What all tests share."""

import os

# Before anything imports torch: a test has one core, like a rank of a job.
os.environ.setdefault("OMP_NUM_THREADS", "1")
