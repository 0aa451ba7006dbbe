"""Finds and builds the compiled kernels: `native` (CPU) and `cuda`. Standard library only.

Both are plain shared libraries without PyTorch's headers, so a build takes seconds, needs no ninja
and serves every version of torch. `setup.py` builds them at installation into `lib/` where it finds
the compilers; whatever is missing is built at first use into a cache. A file's name carries a hash
of everything that it was made from and for, so a stale or foreign build is never loaded: edited
sources, other flags, another processor (the CPU library uses all of its instructions) or C library
lead to another name.

Environment: CXX, CUDA_HOME or CUDA_PATH, and MEGATRON_SALT_CACHE, the folder for builds at first
use (default megatron_salt in XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

LibraryKind = Literal["native", "cuda"]

SOURCES = Path(__file__).parent / "csrc"
INSTALLED = Path(__file__).parent / "lib"
"""Libraries that `setup.py` built."""

CUDA_ARCHITECTURES = (80, 90, 100)
"""Machine code at installation: A100; H100 and H200; B200. PTX of the last serves later ones.

Where nvcc is too old for one (sm_100 needs CUDA 12.8), the PTX of the last that it knows serves.
"""

CXX_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
# -fmad=false: the sources say themselves where a product and a sum share one rounding.
NVCC_FLAGS = (
    "-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC", "--threads", "0", "--resource-usage",
)  # fmt: skip

_logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """No compiler, or it failed. The message says which, and what to do."""


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, or the first on the path."""
    chosen = os.environ.get("CXX")
    return shutil.which(chosen) if chosen else shutil.which("g++") or shutil.which("c++")


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME ($CUDA_PATH), of the path, or of /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def known_to(nvcc: str, architectures: Sequence[int]) -> list[int]:
    """Each architecture, or in its place the newest before it that this nvcc knows; in order.

    Raises: BuildError for an architecture before all that it knows.
    """
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    if not known:  # too old to say: let it try
        return sorted(architectures)
    chosen = {}
    for wanted in sorted(architectures):
        chosen[wanted] = max((each for each in known if each <= wanted), default=0)
        if chosen[wanted] == 0:
            raise BuildError(f"{nvcc} no longer knows sm_{wanted}: take an older CUDA toolkit")
        if chosen[wanted] != wanted:
            _logger.warning(
                "%s does not know sm_%d: its GPUs get the code of sm_%d, by way of PTX",
                nvcc, wanted, chosen[wanted],
            )  # fmt: skip
    return sorted(set(chosen.values()))


def compile_command(
    kind: LibraryKind, output: Path, architectures: Sequence[int] = CUDA_ARCHITECTURES
) -> list[str]:
    """The whole build of one library.

    Raises: BuildError where its compiler is missing.
    """
    if kind == "native":
        compiler = find_cxx()
        if compiler is None and os.environ.get("CXX"):
            raise BuildError(
                f"CXX={os.environ['CXX']} is no program on this machine: correct or unset it"
            )
        if compiler is None:
            raise BuildError(
                "no C++ compiler found (g++, c++ or CXX); on Debian and Ubuntu: apt-get install g++"
            )
        return [compiler, *CXX_FLAGS, str(SOURCES / "kd_loss.cpp"), "-o", str(output)]
    compiler = find_nvcc()
    if compiler is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"{home}/bin" if home else "nvcc on the path, /usr/local/cuda"
        raise BuildError(
            f"no CUDA compiler found ({where}); install NVIDIA's CUDA toolkit, or point CUDA_HOME "
            "to it"
        )
    host = find_cxx()
    architectures = known_to(compiler, architectures)
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    last = architectures[-1]
    flags.append(f"-gencode=arch=compute_{last},code=compute_{last}")  # PTX, for later ones
    return [
        compiler, *NVCC_FLAGS, *(["-ccbin", host] if host else []), "-shared",
        *flags, str(SOURCES / "kd_loss.cu"), "-o", str(output),
    ]  # fmt: skip


def library_name(kind: LibraryKind, architectures: Sequence[int] = CUDA_ARCHITECTURES) -> str:
    """File name of the library that this code, these flags and this machine need.

    `architectures` are those it serves: compute nodes need no nvcc to look for it.
    """
    key = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    made_for: tuple[object, ...] = (platform.machine(), platform.libc_ver())
    if kind == "native":
        made_for += (CXX_FLAGS, _processor_features())
    else:
        made_for += (NVCC_FLAGS, tuple(architectures))
    key.update(repr(made_for).encode())
    return f"{kind}-{key.hexdigest()[:16]}.so"


def _processor_features() -> str:
    """What -march=native looks at, as Linux lists it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return platform.processor()


def build(
    kind: LibraryKind, folder: Path, architectures: Sequence[int] = CUDA_ARCHITECTURES
) -> Path:
    """Compile one library into `folder`; a build that is cut short leaves no library behind.

    What the compiler said is beside it in a `.log`: of CUDA each kernel's registers and spills.

    Raises: BuildError with the compiler's words.
    """
    target = folder / library_name(kind, architectures)
    # By the umask: an installation is for all its users. A cache is there already, see `_locked`.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        output = Path(scratch) / target.name
        command = compile_command(kind, output, architectures)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr or done.stdout).strip()[-4000:]
            raise BuildError(f"{shlex.join(command)}\nfailed ({done.returncode}):\n{words}")
        log = output.with_suffix(".log")
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        output.chmod(output.stat().st_mode & ~0o022)  # or it would not be loaded, see `distrust`
        # Never in place of a file that is there: on a network file system another node may have it
        # loaded. Whoever comes second has built the same.
        for made in (log, output):
            with contextlib.suppress(FileExistsError):
                os.link(made, folder / made.name)
    return target


def find_or_build(kind: LibraryKind, architectures: Sequence[int] = CUDA_ARCHITECTURES) -> Path:
    """The library from the installation, from the cache, or built now into the cache.

    Processes of one machine that need the same build do it once: the others wait for it. The lock
    is the kernel's and goes with its process, so a killed build stops nobody.

    Raises: BuildError.
    """
    name = library_name(kind, architectures)
    installed = [INSTALLED / name]
    # That of all architectures runs on what is newer than their first, by machine code or PTX.
    if kind == "cuda" and min(architectures) >= min(CUDA_ARCHITECTURES):
        installed.append(INSTALLED / library_name(kind))
    for path in installed:
        if path.exists():
            return path
    cache = _own_folder(cache_folder())
    if (cache / name).exists():
        return _trusted(cache / name)
    with _locked(cache, f"{kind}.lock"):
        if (cache / name).exists():
            return _trusted(cache / name)
        return build(kind, cache, architectures)


def distrust(path: Path) -> str | None:
    """Why code that lies there is not loaded, if it may be another user's.

    Not asked of what was installed: who can change that can change this file too.
    """
    found = path.stat()
    if found.st_uid not in (0, os.getuid()):
        return f"{path} belongs to the user of number {found.st_uid}"
    if found.st_mode & 0o022:
        return f"{path} can be changed by others (mode {found.st_mode & 0o7777:o})"
    return None


def _own_folder(folder: Path) -> Path:
    """The folder, or one of this user's in it if others can write there."""
    if not folder.exists() or not (why := distrust(folder)):
        return folder
    if folder.stat().st_uid not in (0, os.getuid()):  # its owner can exchange what is in it
        return _trusted(folder)
    own = folder / f"user-{os.getuid()}"
    _logger.warning("%s: compiled kernels are kept in %s", why, own)
    with contextlib.suppress(OSError):  # said by `_locked`
        own.mkdir(mode=0o700, exist_ok=True)
    return _trusted(own) if own.exists() else own


def _trusted(path: Path) -> Path:
    """The path. Raises: BuildError if another user could have put code there."""
    if why := distrust(path):
        raise BuildError(
            f"{why}, and is not used: set MEGATRON_SALT_CACHE to a folder of your own, of mode 700"
        )
    return path


def cache_folder() -> Path:
    """Where builds at first use go.

    Raises: BuildError for a user without a home directory.
    """
    chosen = os.environ.get("MEGATRON_SALT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "megatron_salt"
    except RuntimeError as error:
        raise BuildError(f"{error} Set MEGATRON_SALT_CACHE to a folder for builds") from error


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(folder / name, "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise BuildError(
            f"cannot write to {folder}: {error.strerror}; set MEGATRON_SALT_CACHE to a folder "
            "for compiled kernels"
        ) from error
    with lock:
        # A file system without locks costs a double build, nothing else: builds are atomic.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
