"""Builds the compiled kernels. What the package is called and needs stands in pyproject.toml.

``tversky_kernels/_C.so`` holds the CPU operators, ``_C_cuda.so`` the CUDA operators where nvcc is found. They use
LibTorch's stable ABI and no Python C API, so that one wheel (``py3-none-<platform>``) serves every Python >= 3.10 and
every torch >= 2.11, and loads on a CPU-only torch also with CUDA code. Switches, all environment variables:

TVERSKY_KERNELS_SKIP_EXT=1      build nothing: pure Python, with the Triton kernels
TVERSKY_KERNELS_WITH_CUDA       auto (default: where nvcc is found), 0, or 1 (required)
TORCH_CUDA_ARCH_LIST            as torch reads it, less what is older than 8.0 (default "8.0;9.0+PTX" and the cards of
                                this machine that are newer; others compile the PTX at their first call)
CUDA_HOME                       where bin/nvcc is, if not on the PATH
TVERSKY_KERNELS_OBJECTS         a folder in which what was compiled is kept, and taken from where nothing has changed
MAX_JOBS                        compiler processes at a time (default: the processors there are)
CXX, CXXFLAGS                   the compiler (default g++, then c++) and further flags for it
"""

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

import setuptools

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which pip does not look at in a build that is not isolated
if (found := re.match(r"\d+", setuptools.__version__)) and int(found[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"Building tversky_kernels needs setuptools >= {OLDEST_SETUPTOOLS}, "
        f"and this Python has {setuptools.__version__}.\npip install 'setuptools>={OLDEST_SETUPTOOLS}'"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
OLDEST_TORCH = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of that torch

KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
X86_CAPABILITIES = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx512_bf16": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mavx512bf16",
        "-DTK_ONLY_BFLOAT16",
    ],
}

NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--extended-lambda"]
CUDA_CARDS = (80, 90)
#: The sources that take longest to compile.
SLOWEST = ("split_labels", "few", "count_pass", "gradient_pass", "region_gradient_pass")


def switch(name, default, allowed):
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def torch_directory():
    """Where torch is installed; found without importing it, for an import takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "Building tversky_kernels needs torch, which this Python does not find.\n"
            "In an isolated build it never does: a build environment's own torch would be gigabytes of the wrong one.\n"
            f"Install torch >= {OLDEST_TORCH}, then: pip install --no-build-isolation tversky_kernels\n"
            "(from a checkout: pip install --no-build-isolation .)\n"
            "Without compiled kernels: TVERSKY_KERNELS_SKIP_EXT=1 pip install --no-build-isolation ."
        )
    return pathlib.Path(spec.origin).parent


def jobs():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def compiler():
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise SystemExit(
        f"Building tversky_kernels needs a C++17 compiler; {asked or 'g++, c++ and clang++'} not found.\n"
        "Install one (Debian: apt install g++), name one in CXX, or build none: TVERSKY_KERNELS_SKIP_EXT=1"
    )


def find_nvcc():
    """nvcc's path, or None where there is none or it is not wanted."""
    wanted = switch("TVERSKY_KERNELS_WITH_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "TVERSKY_KERNELS_WITH_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on the PATH.\n"
            "Install the CUDA toolkit, or leave the switch away."
        )
    return nvcc


@functools.cache
def cuda_code():
    """What nvcc is to compile for, like ["sm_80", "sm_90", "compute_90"]; empty where TORCH_CUDA_ARCH_LIST names older
    cards alone."""
    entries = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    code = set()
    for entry in filter(None, entries):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)  # nothing here needs what a and f stand for
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}")
        number = int(match[1] + match[2])
        if number < CUDA_CARDS[0]:  # as in images that serve all cards, which set this variable: Triton is for those
            print(f"TORCH_CUDA_ARCH_LIST: {entry} is left out, the CUDA kernels take 8.0 and newer", flush=True)
            continue
        code |= {("sm", number), ("compute", number)} if match[3] else {("sm", number)}
    if not any(entries):
        code = {("sm", number) for number in {*CUDA_CARDS, *newer_cards_here()}} | {("compute", CUDA_CARDS[-1])}
    return [f"{kind}_{number}" for kind, number in sorted(code, key=lambda entry: (entry[0] == "compute", entry[1]))]


def newer_cards_here():
    """The cards of this machine that would have to wait for the driver to compile the PTX at their first call."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return set()
    options = ["--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run([smi, *options], capture_output=True, text=True).stdout
    known = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    numbers = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}
    return {number for number in numbers if number > CUDA_CARDS[-1] and f"sm_{number}" in known}


class BuildExt(build_ext):
    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"  # no Python tag: it is not a Python module

    def get_export_symbols(self, ext):
        return []

    def compile_commands(self, ext, objects):
        torch = torch_directory()
        stable_abi = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", torch / "include"]
        if ext.name.endswith("_cuda"):
            host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", compiler()[0]]
            host.append(f"--threads={max(1, jobs() // len(ext.sources))}")  # its architectures side by side
            code = [f"-gencode=arch=compute_{entry.split('_')[1]},code={entry}" for entry in cuda_code()]
            code.append(f"-DTK_CUDA_CODE={'.'.join(cuda_code())}")
            for source in ext.sources:
                out = objects / f"{pathlib.Path(source).stem}.o"
                yield out, [find_nvcc(), *NVCC_FLAGS, *stable_abi, *host, *code, "-c", source]
            return
        base = [*compiler(), "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        base += shlex.split(os.environ.get("CXXFLAGS", ""))
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        capabilities = X86_CAPABILITIES if x86 else {"baseline": []}
        for source in ext.sources:
            stem = pathlib.Path(source).stem
            if stem.endswith("_pass"):
                for capability, flags in capabilities.items():
                    if capability == "avx512_bf16" and stem != "gradient_pass":
                        continue  # it rounds nothing
                    out = objects / f"{stem}_{capability}.o"
                    yield out, [*base, *KERNEL_FLAGS, *flags, f"-DTK_CAPABILITY={capability}", "-c", source]
            else:
                flags = ["-DTK_WITH_AVX"] if x86 else []
                out = objects / f"{stem}.o"
                yield out, [*base, *stable_abi, *flags, "-c", source]

    def build_extension(self, ext):
        library = torch_directory() / "lib"
        out = pathlib.Path(self.get_ext_fullpath(ext.name))
        objects = pathlib.Path(self.build_temp) / ext.name
        out.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        commands = list(self.compile_commands(ext, objects))
        with concurrent.futures.ThreadPoolExecutor(jobs()) as pool:
            # None of the slowest may be the last to be begun.
            slowest_first = sorted(commands, key=lambda command: not command[0].stem.startswith(SLOWEST))
            list(pool.map(lambda command: compile_object(*command), slowest_first))
        # Without --no-as-needed the loader does not find the shims of a torch that splits its libraries otherwise.
        linker, flags = (
            compiler(),
            ["-Wl,--no-as-needed"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"],
        )
        if ext.name.endswith("_cuda"):
            linker, flags = [find_nvcc()], ["-Xlinker=--no-as-needed"]  # adds the static CUDA runtime
        linked = [out for out, _ in commands]
        run([*linker, "-shared", "-o", out, *linked, f"-L{library}", *flags, "-ltorch", "-ltorch_cpu"])


def sources_of(source):
    """A source and all that it includes of ours, in a fixed order."""
    found, waiting = set(), [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():  # what is not ours is found elsewhere
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
            waiting += [(path.parent / name).resolve() for name in names]
    return sorted(found)


@functools.cache
def version_of(tool):
    return subprocess.run([tool, "--version"], capture_output=True).stdout


def compile_object(out, command):
    """Compiles, or takes what the same command made of the same sources, by the same tools, before."""
    folder = os.environ.get("TVERSKY_KERNELS_OBJECTS")
    if not folder:
        return run([*command, "-o", out])
    key = hashlib.sha256(repr([str(part) for part in command]).encode())
    for path in sources_of(ROOT / command[-1]):
        key.update(path.name.encode() + path.read_bytes())
    for tool in sorted({command[0], compiler()[0]}):
        key.update(version_of(tool))
    key.update((torch_directory() / "version.py").read_bytes())
    kept = pathlib.Path(folder) / f"{out.parent.name}.{out.stem}.{key.hexdigest()[:32]}.o"
    if kept.exists():
        print(f"{out.name}: as it was compiled before", flush=True)
        shutil.copy(kept, out)
        return
    run([*command, "-o", out])
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{out.parent.name}.{out.stem}.*.o"):
        old.unlink(missing_ok=True)
    incomplete = kept.with_suffix(f".{os.getpid()}")  # no other process finds half of it
    shutil.copy(out, incomplete)
    incomplete.rename(kept)


def run(command):
    command = [str(part) for part in command]
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"tversky_kernels: this failed with exit code {result.returncode}:\n  {shlex.join(command)}")


class Wheel(bdist_wheel):
    def get_tag(self):
        plat = super().get_tag()[2]
        return ("py3", "none", plat) if self.distribution.has_ext_modules() else super().get_tag()


def extensions():
    if switch("TVERSKY_KERNELS_SKIP_EXT", "0", ("0", "1")) == "1":
        return []
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h"))
    found = [Extension("tversky_kernels._C", sources_in("cpu", "*.cpp"), depends=headers)]
    if find_nvcc() is not None:
        if not cuda_code():
            if os.environ.get("TVERSKY_KERNELS_WITH_CUDA") == "1":
                raise SystemExit("TVERSKY_KERNELS_WITH_CUDA=1, but TORCH_CUDA_ARCH_LIST names nothing from 8.0 on.")
            return found
        found.append(Extension("tversky_kernels._C_cuda", sources_in("cuda", "*.cu"), depends=headers))
    return found


def sources_in(folder, pattern):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(pattern))


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "bdist_wheel": Wheel})
