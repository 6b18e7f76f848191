"""Builds the C++ kernels; everything else is in pyproject.toml.

The kernels are compiled against the torch that is installed, so they are built without build isolation (`pip install
--no-build-isolation`). Where there is no torch, as on a machine that only serves tables, or no compiler, the package
installs without them, and the plain-PyTorch reference runs.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# -Wno-maybe-uninitialized: GCC 12 warns of its own AVX-512 header.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
if os.environ.get("THRESHER_SANITIZE"):  # for `make sanitize`
    FLAGS = ["-O1", "-g", "-fopenmp", "-fvisibility=hidden", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
SOURCES = Path("service/thresher/kernels/cpu")

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    setup()
    sys.exit()


class BuildKernels(BuildExtension):
    """Goes on without the kernels where they cannot be compiled."""

    def build_extensions(self):
        """Compile them."""
        try:
            super().build_extensions()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"thresher is installed without its C++ kernels: {error}", file=sys.stderr)  # noqa: T201


setup(
    ext_modules=[
        CppExtension(
            "thresher.kernels._cpu",
            sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in [*SOURCES.glob("*.h"), *SOURCES.glob("*.inc")]),
            extra_compile_args=FLAGS,
            extra_link_args=[flag for flag in FLAGS if flag.startswith(("-fopenmp", "-fsanitize"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
)
