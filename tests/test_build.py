"""What is built: one wheel for every Python that works in an empty environment, and errors that say what is missing."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import setup_flags

ROOT = pathlib.Path(__file__).parent.parent


def run(*command, cwd, environment=None, check=True):
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **(environment or {})}
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a source distribution holds, made where nothing is compiled; builds in it leave nothing behind."""
    where = tmp_path_factory.mktemp("source")
    own = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "*.egg-info")
    shutil.copytree(ROOT, where / "all", ignore=own)
    environment = {"TVERSKY_KERNELS_SKIP_EXT": "1"}
    run(sys.executable, "setup.py", "sdist", "-d", where, cwd=where / "all", environment=environment)
    run("tar", "xzf", next(where.glob("*.tar.gz")), cwd=where)
    return next(where.glob("tversky_kernels-*/"))


def test_source_distribution_is_whole(source):
    """Wherever it was made, also without nvcc."""
    for folder in ("csrc", "tversky_kernels"):
        kept = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".so", ".pyc")}
        assert {str(p.relative_to(ROOT)) for p in kept} <= {str(p.relative_to(source)) for p in source.rglob("*")}
    assert not (source / "tests").exists()


def build_wheel(source, out, environment=None, check=True):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source]
    result = run(*command, cwd=source, environment=environment, check=check)
    return result if not check else next(pathlib.Path(out).glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    # `make test` has kept what it compiled. Else for one architecture, for nvcc takes minutes.
    environment = {} if os.environ.get("TVERSKY_KERNELS_OBJECTS") else {"TORCH_CUDA_ARCH_LIST": "9.0"}
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), environment)


def empty_environment(where):
    """A new virtual environment in which only this one's torch and what it needs can be imported besides."""
    run(sys.executable, "-m", "venv", where, cwd=where.parent)
    site = next((where / "lib").glob("python*")) / "site-packages"
    import torch

    (site / "torch_of_the_tests.pth").write_text(str(pathlib.Path(torch.__file__).parent.parent) + "\n")
    return where / "bin" / "python"


def test_wheel_is_for_every_python(wheel):
    assert re.fullmatch(r"tversky_kernels-[\d.]+-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "tversky_kernels/_C.so" in names
    assert ("tversky_kernels/_C_cuda.so" in names) == (shutil.which("nvcc") is not None)
    assert "tversky_kernels/triton/all_classes.py" in names
    assert "tversky_kernels/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "examples/", "csrc/"))]


def test_library_uses_no_python_and_no_unstable_abi(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(n, tmp_path) for n in archive.namelist() if n.endswith(".so")]
    for library in libraries:
        wanted = run("nm", "-D", "--undefined-only", "-C", library, cwd=tmp_path).stdout
        assert not re.findall(r"\bU _?Py\w+", wanted)
        assert not re.findall(r"\bU (?:at|c10|torch)::.*", wanted), "only the C shims are stable"
        assert not re.findall(r"\bU (?:__)?cuda\w+", wanted), "the CUDA runtime is linked in"
        needed = run("readelf", "-d", library, cwd=tmp_path).stdout
        assert not re.findall(r"libpython|libc10|libtorch_python|libcudart", needed)


def test_kernels_of_wider_instruction_sets_share_nothing(source, wheel, tmp_path):
    """An inline function compiled for AVX-512 must not be the copy that the linker keeps for everybody."""
    objects = sorted((source / "build").rglob("*_pass_*.o"))  # of the wheel
    passes = len(list((source / "csrc" / "cpu").glob("*_pass.cpp")))
    of_x86 = passes * (len(setup_flags.X86_CAPABILITIES) - 1) + 1  # avx512_bf16 has a gradient pass alone
    assert len(objects) in (passes, of_x86)
    for path in objects:
        symbols = run("nm", "-C", "--defined-only", path, cwd=tmp_path).stdout
        assert not re.findall(r"^\w+ [WVu] .*", symbols, re.M), path.name


def test_wheel_installs_and_works_in_an_empty_environment(wheel, tmp_path):
    python = empty_environment(tmp_path / "environment")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    program = (
        "import torch, tversky_kernels as tk\n"
        "assert tk.available_backends()['cpu'] is True, tk.available_backends()\n"
        "z = torch.randn(1, 3, 8, 8, 8, requires_grad=True)\n"
        "t = torch.randint(0, 3, (1, 8, 8, 8))\n"
        "tk.tversky_loss(z, t, backend='cpu').backward()\n"
        "print(tk.__file__, z.grad.abs().sum().item() > 0)\n"
    )
    printed = run(python, "-W", "ignore", "-c", program, cwd=tmp_path).stdout
    assert printed.startswith(str(tmp_path / "environment"))
    assert printed.rstrip().endswith("True")


def test_version_is_the_projects(wheel):
    import tversky_kernels as tk

    assert wheel.name.split("-")[1] == tk.__version__


def test_without_the_extension(source, tmp_path):
    pure = build_wheel(source, tmp_path / "wheel", {"TVERSKY_KERNELS_SKIP_EXT": "1"})
    assert pure.name.endswith("-py3-none-any.whl")
    python = empty_environment(tmp_path / "environment")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", pure, cwd=tmp_path)
    program = (
        "import torch, tversky_kernels as tk\n"
        "assert 'without these compiled kernels' in tk.available_backends()['cpu']\n"
        "z, t = torch.randn(1, 3, 8), torch.randint(0, 3, (1, 8))\n"
        "torch.testing.assert_close(tk.tversky_loss(z, t), tk.reference.tversky_loss(z, t))\n"
        "try:\n    tk.tversky_loss(z, t, backend='cpu')\nexcept ValueError as error:\n    print(error)\n"
    )
    printed = run(python, "-W", "ignore", "-c", program, cwd=tmp_path).stdout
    assert "backend: 'cpu' is not available: the package was built without these compiled kernels" in printed


def test_build_without_torch_says_so_at_once(source, tmp_path):
    python = tmp_path / "environment" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "environment", cwd=tmp_path)
    import setuptools

    # setuptools alone, as an isolated build would have it
    site = next((tmp_path / "environment" / "lib").glob("python*")) / "site-packages"
    for path in site.glob("setuptools-*"):  # which some Pythons bring, as an old version
        shutil.rmtree(path)
    for pattern in ("setuptools", "setuptools-*", "_distutils_hack"):
        for path in pathlib.Path(setuptools.__file__).parent.parent.glob(pattern):
            shutil.copytree(path, site / path.name, dirs_exist_ok=True)
    result = run(python, "setup.py", "bdist_wheel", cwd=source, check=False)
    assert result.returncode != 0
    assert "Building tversky_kernels needs torch" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_build_with_an_old_setuptools_says_so_at_once(source, tmp_path):
    """As a virtual environment of Python 3.10 or 3.11 brings it, which a build without isolation uses."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=source, check=False, environment=environment)
    assert result.returncode != 0
    assert "needs setuptools >= 77, and this Python has 65.5.0" in result.stderr
    assert "pip install 'setuptools>=77'" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "needs a C\\+\\+17 compiler; no-such-compiler not found"),
        ({"CXXFLAGS": "-no-such-flag"}, "this failed with exit code"),
        ({"TVERSKY_KERNELS_SKIP_EXT": "yes"}, "TVERSKY_KERNELS_SKIP_EXT: expected one of 0, 1, got 'yes'"),
        (
            {"TVERSKY_KERNELS_WITH_CUDA": "1", "PATH": "no nvcc here"},
            "TVERSKY_KERNELS_WITH_CUDA=1, but nvcc is neither",
        ),
    ],
)
def test_failing_build_says_what_is_missing(source, tmp_path, environment, message):
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l"]
    result = run(*command, cwd=source, environment=environment, check=False)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr)


def pretend_to_compile(tool, calls):
    """Makes a compiler of this name that notes what it is called with and compiles nothing."""
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "$0" && exit\n'
        '[ "$1" = --list-gpu-code ] && echo "sm_80 sm_90 sm_100 sm_120" && exit\n'
        f'case "$*" in *-shared*) ;; *) echo "$*" >> {calls} ;; esac\n'
        'while [ "$1" != -o ]; do shift; done\necho object > "$2"\n'
    )
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("asked", "cards", "code"),
    [
        ("", "", "sm_80.sm_90.compute_90"),
        ("", "8.6", "sm_80.sm_90.compute_90"),
        ("", "9.0 12.0 12.0", "sm_80.sm_90.sm_120.compute_90"),
        ("", "13.0", "sm_80.sm_90.compute_90"),  # which this nvcc does not know
        ("9.0", "12.0", "sm_90"),
        ("8.0;9.0a+PTX", "", "sm_80.sm_90.compute_90"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "", "sm_80.sm_86.sm_90.sm_100.sm_120.compute_120"),
        ("7.0;7.5+PTX", "", None),
    ],
)
def test_cards_that_are_compiled_for(source, tmp_path, asked, cards, code):
    calls = tmp_path / "calls"
    pretend_to_compile(tmp_path / "cuda" / "bin" / "nvcc", calls)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\n" + "".join(f"echo {card}\n" for card in cards.split()))
    smi.chmod(0o755)
    environment = {
        "CXX": str(pretend_to_compile(tmp_path / "compiler", calls)),
        "CUDA_HOME": str(tmp_path / "cuda"),
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
        "TORCH_CUDA_ARCH_LIST": asked,
        "TVERSKY_KERNELS_OBJECTS": "",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l"]
    result = run(*command, cwd=source, environment=environment)
    left_out = re.findall(r"TORCH_CUDA_ARCH_LIST: (\S+) is left out, the CUDA kernels take 8.0", result.stdout)
    assert left_out == [entry for entry in asked.replace(" ", ";").split(";") if entry.startswith("7.")]
    by_nvcc = [line for line in calls.read_text().splitlines() if "-DTK_CUDA_CODE=" in line]
    if code is None:
        assert not by_nvcc
        result = run(*command, cwd=source, environment=environment | {"TVERSKY_KERNELS_WITH_CUDA": "1"}, check=False)
        assert result.returncode != 0
        assert "TVERSKY_KERNELS_WITH_CUDA=1, but TORCH_CUDA_ARCH_LIST names nothing from 8.0 on" in result.stderr
        return
    assert len(by_nvcc) == len(list((source / "csrc" / "cuda").glob("*.cu")))
    of_code = [f"-gencode=arch=compute_{entry.split('_')[1]},code={entry}" for entry in code.split(".")]
    for line in by_nvcc:
        assert f" {' '.join(of_code)} -DTK_CUDA_CODE={code} " in line


def test_kept_objects_are_taken_until_something_changes(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    calls = tmp_path / "calls"
    compiler, _ = (pretend_to_compile(tmp_path / tool, calls) for tool in ("compiler", "cuda/bin/nvcc"))
    environment = {"CXX": compiler, "TVERSKY_KERNELS_OBJECTS": tmp_path / "objects", "CUDA_HOME": tmp_path / "cuda"}

    def compiled(hash_seed=0):
        environment["PYTHONHASHSEED"] = hash_seed  # by which Python orders sets of strings
        calls.write_text("")
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        command = [sys.executable, "setup.py", "build_ext", "--force", "--build-temp", tmp_path / "t"]
        run(*command, "--build-lib", tmp_path / "l", cwd=copy, environment={k: str(v) for k, v in environment.items()})
        return len(calls.read_text().splitlines())

    first = compiled()
    assert first > 3
    assert [compiled(seed) for seed in range(4)] == [0] * 4
    environment["CXXFLAGS"] = "-g"
    cuda = len(list((copy / "csrc" / "cuda").glob("*.cu")))
    assert compiled() == first - cuda
    changes = {"common/mathematics.h": first, "cpu/kernels.h": first - cuda - 1, "cpu/capability.cpp": 1}
    changes |= {"cuda/launch.h": cuda, "cuda/tile.cuh": 2, "torch/operators.h": 2}  # the sources that include it
    for name, recompiled in changes.items():
        path = copy / "csrc" / name
        path.write_text(path.read_text() + "// another\n")
        assert compiled() == recompiled
    assert len(list((tmp_path / "objects").iterdir())) == first
