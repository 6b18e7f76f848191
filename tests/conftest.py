"""What all tests share."""

import os
from pathlib import Path

import pytest

# Before anything imports torch: a test has one core, like a rank of a job.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton, and torchrec does: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # here alone: most tests need no torch, and its import takes a second

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
