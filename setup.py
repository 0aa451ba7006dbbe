"""Build script: finds the packages; everything else is said in pyproject.toml.

It exists because compiled kernels need code. They hook in here, as `ext_modules` and a `cmdclass`
for machines where they should be built at install time; without them they are built at first use.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megatron_salt*"]),
    # Sources of the kernels travel with the package, so that they can be built at first use.
    package_data={"megatron_salt": ["kernels/csrc/*"]},
)
