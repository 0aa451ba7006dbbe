"""The compiled kernels: they compile for every GPU architecture, and builds are found again."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import run_forked

from megatron_salt.kernels import build, compiled

pytestmark = pytest.mark.processes

NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit on this machine")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@needs_nvcc
def test_cuda_kernels_compile_without_spills() -> None:
    """By what the assembler said when this machine's library was built, of each architecture."""
    report = build.find_or_build("cuda").with_suffix(".log").read_text(encoding="utf-8")
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert NVCC is not None
    # Sums: 9 pairs of student and teacher, 3 students alone, 3 with a sparse teacher. Gradient, and
    # both passes in one: 25, with an fp32 student's gradient in any dtype. Rescale and finish: of
    # each kind of teacher and without.
    each = 15 + 2 * 25 + 6
    expected = {str(known): each for known in build.known_to(NVCC, build.CUDA_ARCHITECTURES)}
    assert Counter(architecture for _, architecture in kernels) == expected
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert len(frames) == len(kernels) and set(frames) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(kernels) and max(registers) <= 64


@needs_nvcc
def test_cuda_kernels_read_and_write_16_bytes_at_a_time(tmp_path: Path) -> None:
    """In the assembly for the first architecture: no source asks which one it is compiled for."""
    assert NVCC is not None
    sources = [path.read_text(encoding="utf-8") for path in build.SOURCES.iterdir()]
    assert not any("__CUDA_ARCH__" in source for source in sources)
    command = [
        NVCC, *[flag for flag in build.NVCC_FLAGS if flag != "--resource-usage"],
        "-Xcompiler", ",".join(WARNINGS), "-Werror", "all-warnings",
        f"-arch=sm_{build.known_to(NVCC, build.CUDA_ARCHITECTURES)[0]}",
        "-ptx", str(build.SOURCES / "kd_loss.cu"), "-o", str(tmp_path / "kd_loss.ptx"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr.lower()
    ptx = (tmp_path / "kd_loss.ptx").read_text(encoding="utf-8")
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, flags=re.DOTALL))
    rows = {
        name: body
        for name, body in kernels.items()
        if re.search("row_sums_kernel|gradient_kernel|both_passes_kernel", name)
    }
    assert len(rows) == 15 + 2 * 25
    for name, body in rows.items():
        assert re.search(r"ld\.global(\.nc)?\.v4\.[bfu]32", body), name
        if "row_sums" not in name:
            assert re.search(r"st\.global\.v4\.[bfu]32", body), name


def fake_nvcc(folder: Path, known: str) -> Path:
    """A program in `folder`/bin that lists architectures and writes its other words into a file."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "".join(f"echo compute_{number}; " for number in known.split()) or "exit 1; "
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && {{ {listed}exit 0; }}\n'
        'for word; do [ "$previous" = -o ] && echo "$@" > "$word"; previous=$word; done\n',
        encoding="utf-8",
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("known", "machine_code", "ptx", "said"),
    [
        ("75 80 86 90 100 110 103 120", ["80", "90", "100"], "100", []),
        ("52 80 86 87 89 90", ["80", "90"], "90", ["sm_100: its GPUs get the code of sm_90"]),
        ("50 70 80 86", ["80", "86"], "86", ["sm_90: its GPUs", "sm_100: its GPUs"]),
        ("", ["80", "90", "100"], "100", []),  # it cannot list them
    ],
)
def test_code_is_made_for_what_nvcc_knows(
    known: str, machine_code: list[str], ptx: str, said: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fake_nvcc(tmp_path, known)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    library = build.build("cuda", tmp_path / "lib")
    words = library.read_text(encoding="utf-8")
    assert re.findall(r"code=sm_(\d+)", words) == machine_code
    assert re.findall(r"code=compute_(\d+)", words) == [ptx]
    assert len(caplog.messages) == len(said)
    assert all(part in message for part, message in zip(said, caplog.messages, strict=True))
    # Found again where there is no nvcc, under the architectures that it serves.
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    monkeypatch.setenv("MEGATRON_SALT_CACHE", str(library.parent))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "none")
    assert build.find_or_build("cuda") == library


def test_an_architecture_that_nvcc_dropped_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path, "90 100 120")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no longer knows sm_80"):
        build.build("cuda", tmp_path / "lib")


@needs_nvcc
def test_this_nvcc_is_asked_for_its_architectures() -> None:
    assert NVCC is not None
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    newest = [arch for arch in build.CUDA_ARCHITECTURES if f"compute_{arch}" in listed.split()]
    assert newest and build.known_to(NVCC, newest) == newest


def test_native_code_compiles_without_warnings_and_is_vectorised(tmp_path: Path) -> None:
    """By the compiler's own report of the loops over columns."""
    command = [*build.compile_command("native", tmp_path / "native.so"), *WARNINGS]
    by_gcc = "g++" in Path(command[0]).name
    command += ["-fopt-info-vec-optimized"] if by_gcc else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    if not by_gcc:
        return
    lines = (build.SOURCES / "row_math.h").read_text(encoding="utf-8").splitlines()
    marked = [
        number for number, text in enumerate(lines, 1) if text.strip().startswith("SALT_SIMD(")
    ]
    found = re.findall(r"row_math\.h:(\d+):\d+: optimized: loop vectorized", done.stderr)
    vectorised = {int(number) for number in found}
    assert len(marked) == 5
    for number in marked:  # reported at the mark, at the loop or at its body
        assert vectorised & {number, number + 1, number + 2}, lines[number : number + 2]


def test_sources_need_no_header_of_pytorch() -> None:
    for path in build.SOURCES.iterdir():
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text(encoding="utf-8"))
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10"))], path


def test_a_name_tells_sources_flags_and_architectures_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {build.library_name("native"), build.library_name("cuda")}
    names.add(build.library_name("cuda", [90]))
    monkeypatch.setattr(build, "CXX_FLAGS", (*build.CXX_FLAGS, "-g"))
    names.add(build.library_name("native"))
    monkeypatch.setattr(build, "_processor_features", lambda: "another processor")
    names.add(build.library_name("native"))
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    names.add(build.library_name("native"))
    assert len(names) == 6


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is installed, and the cache is empty."""
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "lib")
    monkeypatch.setenv("MEGATRON_SALT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_several_processes_build_once(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "csrc"
    small.mkdir()
    (small / "kd_loss.cpp").write_text("int salt_probe() { return 0; }\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", small)
    counter = tmp_path / "g++"
    counter.write_text(
        f'#!/bin/sh\necho run >> {tmp_path}/runs\nsleep 0.5\nexec {build.find_cxx()} "$@"\n',
        encoding="utf-8",
    )
    counter.chmod(0o755)
    monkeypatch.setenv("CXX", str(counter))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(build.find_or_build, ["native"] * 3, chunksize=1)
    assert set(found) == {elsewhere / build.library_name("native")}
    assert (tmp_path / "runs").read_text(encoding="utf-8").count("run") == 1
    assert not list(elsewhere.glob(".building-*"))


def test_an_installed_library_is_used_and_a_stale_one_is_not(elsewhere: Path) -> None:
    installed = elsewhere.parent / "lib"
    installed.mkdir()
    (installed / "native-0123456789abcdef.so").write_bytes(b"of earlier sources")
    path = installed / build.library_name("native")
    path.write_bytes(b"of these sources")
    assert build.find_or_build("native") == path
    assert not elsewhere.exists()


def test_an_older_gpu_is_not_given_the_installed_code(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = elsewhere.parent / "lib"
    installed.mkdir()
    library = installed / build.library_name("cuda")
    library.write_bytes(b"for sm_80 and later")
    monkeypatch.setattr(build, "build", lambda kind, folder, architectures: architectures)
    assert build.find_or_build("cuda", [90]) == build.find_or_build("cuda", [120]) == library
    assert build.find_or_build("cuda", [75]) == [75]


def test_installed_code_needs_no_home_directory(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEGATRON_SALT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.BuildError, match="home directory.*MEGATRON_SALT_CACHE"):
        build.find_or_build("native")
    installed = elsewhere.parent / "lib"
    installed.mkdir()
    library = installed / build.library_name("native")
    library.write_bytes(b"of these sources")
    assert build.find_or_build("native") == library


def test_a_library_that_cannot_run_is_a_reason_and_no_body(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a driver that is too old for the CUDA toolkit: it loads, and its probe fails."""
    source = tmp_path / "broken.cpp"
    names = ("local_sums", "rescale", "finish", "gradient", "values_and_gradient")
    source.write_text(
        'extern "C" {\nint salt_probe() { return 35; }\n'
        'const char* salt_error(int) { return "driver too old"; }\n'
        + "".join(f"void salt_{name}() {{}}\n" for name in names) + "}\n",
        encoding="utf-8",
    )  # fmt: skip
    library = tmp_path / "broken.so"
    compiler = build.find_cxx()
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(build, "find_or_build", lambda *about: library)
    reason = compiled.load.__wrapped__("native")
    assert isinstance(reason, str) and "cannot run here: driver too old" in reason


def test_missing_and_failing_compilers_are_named(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler is no program"):
        build.find_or_build("native")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"kd_loss.cpp[^\n]*\nfailed \(1\)"):
        build.find_or_build("native")
    assert not list(elsewhere.glob("*.so"))
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    with pytest.raises(build.BuildError, match="no CUDA compiler found .*no/such/folder"):
        build.find_or_build("cuda")


def test_a_cache_that_cannot_be_written_names_the_setting(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(build.BuildError, match="cannot write to .*MEGATRON_SALT_CACHE"):
        build.find_or_build("native")


def test_command_says_what_is_used_and_why(tmp_path: Path) -> None:
    command = ("-m", "megatron_salt.kernels")
    done = run_forked(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "native     available: " in done.stdout
    assert re.search(r"impl = 'auto' on cpu .*: native", done.stdout)
    done = run_forked(*command, "--require", "cuda", folder=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert re.search(r"cuda +not available: torch .* sees no CUDA device", done.stdout)
    assert "required but not available: cuda" in done.stderr


def write_fake_library(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A library of the right name, and a builder that only notes where it is asked to build."""
    monkeypatch.setenv("MEGATRON_SALT_CACHE", str(cache))
    monkeypatch.setattr(build, "INSTALLED", cache / "none")
    monkeypatch.setattr(build, "build", lambda kind, folder, architectures: folder / "built")
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / build.library_name("native")
    library.write_bytes(b"")
    library.chmod(0o755)
    return library


def of_another_user(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As the package sees it. (Only root could give a file away.)"""
    stat = Path.stat

    def seen(self: Path, **more: Any) -> Any:
        found = stat(self, **more)
        if self != path:
            return found
        return os.stat_result((*found[:4], os.getuid() + 7, *found[5:]))

    monkeypatch.setattr(Path, "stat", seen)


def test_own_library_of_own_folder_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = write_fake_library(monkeypatch, tmp_path / "cache")
    assert build.find_or_build("native") == library


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_library_that_others_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    library = write_fake_library(monkeypatch, tmp_path / "cache")
    library.chmod(mode)
    with pytest.raises(build.BuildError, match=rf"can be changed by others \(mode {mode:o}"):
        build.find_or_build("native")


def test_library_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = write_fake_library(monkeypatch, tmp_path / "cache")
    of_another_user(monkeypatch, library)
    with pytest.raises(build.BuildError, match=f"{library} belongs to the user of number .*CACHE"):
        build.find_or_build("native")


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_library(monkeypatch, tmp_path / "cache")
    of_another_user(monkeypatch, tmp_path / "cache")
    with pytest.raises(build.BuildError, match="cache belongs to the user of number .*CACHE"):
        build.find_or_build("native")


@pytest.mark.parametrize("mode", [0o770, 0o1777])
def test_in_a_shared_folder_each_user_has_one_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    write_fake_library(monkeypatch, tmp_path / "cache")
    (tmp_path / "cache").chmod(mode)
    own = tmp_path / "cache" / f"user-{os.getuid()}"
    assert build.find_or_build("native") == own / "built"
    assert own.stat().st_mode & 0o777 == 0o700
    assert "cache can be changed by others" in caplog.text and str(own) in caplog.text
    own.chmod(0o777)
    with pytest.raises(build.BuildError, match=f"{own} can be changed by others"):
        build.find_or_build("native")


def test_new_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "80 90 100")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MEGATRON_SALT_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "none")
    before = os.umask(0o002)
    try:
        library = build.find_or_build("cuda")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert not library.stat().st_mode & 0o022
    assert build.find_or_build("cuda") == library
