"""No inline function that was compiled for one instruction set can stand in for another's.

`check_symbols.py` looks at the objects of a build; here, it is shown to find what it looks for, and
run on the build folders of this checkout if there are any (FASTBPTT_BUILD_DIR names another).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import IN_CI

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "check_symbols.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def compile_source(tmp_path):
    if COMPILER is None or shutil.which("nm") is None:
        if IN_CI:
            pytest.fail("a C++ compiler and nm are wanted")
        pytest.skip("no C++ compiler or no nm")

    def compiled(name: str, source: str) -> str:
        (tmp_path / f"{name}.cpp").write_text(source)
        target = tmp_path / f"{name}.o"
        subprocess.run(
            [COMPILER, "-std=c++17", "-O1", "-c", f"{name}.cpp", "-o", target],
            cwd=tmp_path,
            check=True,
        )
        return str(target)

    return compiled


def kernel(name: str, namespace: str | None = None) -> str:
    inline = "template <class S> __attribute__((noinline)) S twice(S v) { return v + v; }"
    if namespace:
        inline = f"namespace {namespace} {{ {inline} }} using namespace {namespace};"
    return f'{inline}\nextern "C" float {name}(float v) {{ return twice(v); }}\n'


def test_a_shared_inline_function_is_found(compile_source):
    done = check(
        compile_source("one", kernel("kernel_one")), compile_source("two", kernel("kernel_two"))
    )
    assert done.returncode == 1
    assert "twice" in done.stdout
    assert "one.o" in done.stdout
    assert "two.o" in done.stdout
    assert "kernel_" not in done.stdout


def test_functions_in_namespaces_of_their_own_pass(compile_source):
    done = check(
        compile_source("one", kernel("kernel_one", "avx2")),
        compile_source("two", kernel("kernel_two", "avx512")),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_objects_of_one_instruction_set_may_share(compile_source):
    one = compile_source("one", kernel("kernel_one"))
    two = compile_source("two", kernel("kernel_two"))
    other = compile_source("other", kernel("kernel_other", "avx512"))
    assert check(f"{one},{two}", other).returncode == 0
    assert check(f"{one},{other}", two).returncode == 1


def test_static_libraries_are_read(compile_source, tmp_path):
    if shutil.which("ar") is None:
        pytest.skip("no ar")
    library = str(tmp_path / "libone.a")
    one = compile_source("one", kernel("kernel_one"))
    subprocess.run(["ar", "rcs", library, one], check=True)
    done = check(library, compile_source("two", kernel("kernel_two")))
    assert done.returncode == 1
    assert "twice" in done.stdout


def test_what_cannot_be_read_does_not_pass(tmp_path):
    assert check().returncode == 2
    assert check(str(tmp_path / "missing.o")).returncode == 2
    broken = tmp_path / "broken.o"
    broken.write_text("not an object")
    assert check(str(broken), str(broken)).returncode == 2


def builds() -> list[Path]:
    """CMake build folders that hold the objects of the kernels."""
    named = os.environ.get("FASTBPTT_BUILD_DIR")
    roots = [Path(named)] if named else sorted((HERE.parent / "build").glob("*"))
    return [root for root in roots if list(root.glob("CMakeFiles/fastbptt_kernels_*.dir"))]


def test_the_kernels_of_this_build():
    """Nothing is shared between instruction sets, nor between them and the rest of the library."""
    found = builds()
    if not found:
        pytest.skip("no build folder: set FASTBPTT_BUILD_DIR to check one")
    for build in found:
        groups: dict[str, list[str]] = {}
        for path in sorted(build.glob("CMakeFiles/*.dir/**/*.o")):
            target = path.relative_to(build).parts[1]
            if target.startswith("_reference"):
                continue
            isa = re.fullmatch(r"fastbptt_kernels_(\w+)\.dir", target)
            groups.setdefault(isa[1] if isa else "the rest", []).append(str(path))
        assert len(groups) >= 2
        done = check(*(",".join(group) for group in groups.values()))
        assert done.returncode == 0, done.stdout + done.stderr
