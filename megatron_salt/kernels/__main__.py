"""Says which backends of the loss are here, which one is used, and why.

Builds what is missing, as the first step of a run would. Exit code 1 with --require NAME if that
backend is not available.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from megatron_salt.kernels import build, compiled
from megatron_salt.kernels.choose import choose_backend, load_for


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megatron-salt kernels", description=__doc__)
    parser.add_argument(
        "--require", choices=("native", "cuda"), action="append", default=[],
        help="fail if this backend is not available; may be given twice",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # the reasons are printed below
    available = {"native": load_for(torch.device("cpu")), "cuda": _cuda()}
    print("reference  available: plain PyTorch, any device, every dtype and divergence")
    for name, found in available.items():
        if isinstance(found, str):
            reason = found.replace("\n", "\n" + 11 * " ")
            print(f"{name:9}  not available: {reason}")
        else:
            print(f"{name:9}  available: {found.path}")
    print(f"\ncompilers: C++ {build.find_cxx() or 'none'}, CUDA {build.find_nvcc() or 'none'}")
    print(f"builds at first use go to {build.cache_folder()} (MEGATRON_SALT_CACHE)\n")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        backend = choose_backend("auto", device=device, dtypes=frozenset({torch.bfloat16}))
        print(f"impl = 'auto' on {device} ({kind}): {backend.name}")
    missing = [name for name in arguments.require if isinstance(available[name], str)]
    if missing:
        reasons = "; ".join(f"{name}: {available[name]}" for name in missing)
        print(f"required but not available: {reasons}", file=sys.stderr)
    return 1 if missing else 0


def _cuda() -> compiled.CompiledBackend | str:
    if not torch.cuda.is_available():
        installed = build.INSTALLED / build.library_name("cuda")
        reason = f"torch {torch.__version__} sees no CUDA device"
        if torch.version.cuda is None:
            reason += "; it is a build without CUDA"
        return f"{reason}\n(installed: {installed})" if installed.exists() else reason
    return load_for(torch.device("cuda", torch.cuda.current_device()))


if __name__ == "__main__":
    sys.exit(main())
