"""Build script: finds the packages, and builds the compiled kernels where their compilers are.

Everything else is said in pyproject.toml. What is not built here is built at first use; see
megatron_salt/kernels/build.py, which both go through. MEGATRON_SALT_CUDA=1 makes a missing or
failing CUDA toolkit an error, MEGATRON_SALT_CUDA=0 leaves CUDA out.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
KERNELS = "megatron_salt/kernels"


def load_build_module():
    """megatron_salt.kernels.build without its package, which imports torch."""
    spec = importlib.util.spec_from_file_location("kernels_build", HERE / KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Puts the shared libraries into megatron_salt/kernels/lib, of the wheel or of the checkout."""

    def run(self):
        kernels = load_build_module()
        root = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        folder = root / KERNELS / "lib"
        for made in (*folder.glob("*.so"), *folder.glob("*.log")):  # of earlier sources
            made.unlink()
        wanted = os.environ.get("MEGATRON_SALT_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"MEGATRON_SALT_CUDA={wanted}: expected 0 or 1")
        self.build_one(kernels, "native", folder, required=False)
        if wanted == "1" or (wanted == "" and kernels.find_nvcc()):
            self.build_one(kernels, "cuda", folder, required=wanted == "1")

    def build_one(self, kernels, kind, folder, *, required):
        try:
            print(f"built {kernels.build(kind, folder)}")
        except kernels.BuildError as error:
            if required:
                message = f"MEGATRON_SALT_CUDA=1, but the kernels cannot be built: {error}"
                raise SystemExit(message) from error
            print(f"{kind} kernels are left for their first use: {error}", file=sys.stderr)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    # The examples lie beside the package in a checkout and in it in a wheel.
    packages=[*find_packages(include=["megatron_salt*"]), "megatron_salt.examples"],
    package_dir={"megatron_salt.examples": "examples"},
    # The sources travel with the package, so that the kernels can be built at first use.
    package_data={"megatron_salt": ["kernels/csrc/*"], "megatron_salt.examples": ["*/*"]},
    # Named so that setuptools runs build_ext and tags the wheel with the machine; see BuildKernels.
    ext_modules=[Extension("megatron_salt.kernels.lib.libraries", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
