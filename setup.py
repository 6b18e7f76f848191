"""Builds the C++ parts; everything else is in pyproject.toml.

The lookup core of compact tables needs a compiler alone. The training kernels are compiled against the torch that is
installed, so they are built without build isolation (`pip install --no-build-isolation`). Where there is no compiler,
or, as on a machine that only serves tables, no torch, the package installs without them, and their references in NumPy
and plain PyTorch run.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -Wno-…uninitialized: GCC 12 warns of its own AVX-512 headers.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
LINK_FLAGS = []
if os.environ.get("THRESHER_SANITIZE"):  # for `make sanitize`
    FLAGS = ["-O1", "-g", "-fvisibility=hidden", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
    LINK_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
KERNELS, TABLES = Path("service/thresher/kernels/cpu"), Path("service/thresher/tables/native")


def files(folder, *patterns):
    """Paths as setuptools wants them."""
    return sorted(str(path) for pattern in patterns for path in folder.glob(pattern))


tables = Extension(
    "thresher.tables._tables",
    files(TABLES, "*.cpp"),
    depends=files(TABLES, "*.h", "*.inc"),
    # A product is rounded before it is added, as in NumPy.
    extra_compile_args=[*FLAGS, "-std=c++17", "-ffp-contract=off"],
    extra_link_args=LINK_FLAGS,
    optional=True,
)


class BuildTables(build_ext):
    """Builds plain shared libraries: ctypes loads them, and no version of Python is in their names."""

    def get_ext_filename(self, name):
        """Path of a library."""
        return str(Path(*name.split("."))) + ".so"


try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    setup(ext_modules=[tables], cmdclass={"build_ext": BuildTables})
    sys.exit()


class BuildKernels(BuildExtension):
    """Goes on without the kernels where they cannot be compiled."""

    def build_extensions(self):
        """Compile them."""
        try:
            super().build_extensions()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"thresher is installed without its C++ kernels: {error}", file=sys.stderr)  # noqa: T201


kernels = CppExtension(
    "thresher.kernels._cpu",
    files(KERNELS, "*.cpp"),
    depends=files(KERNELS, "*.h", "*.inc"),
    extra_compile_args=[*FLAGS, "-fopenmp"],
    extra_link_args=[*LINK_FLAGS, "-fopenmp"],
    optional=True,
)
# The core first, which is then there whatever becomes of the kernels.
setup(
    ext_modules=[tables, kernels],
    cmdclass={"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
)
