"""Installs a package of ours in an empty environment and runs the quick tests and the self-check there.

python3.13 tests/tools/release_check.py dist/release/tversky_kernels-0.1.0-py3-none-any.whl torch==2.15.0

The environment is of the Python that runs this script, which needs nothing installed, and is removed at the end.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
#: Of a package without compiled code: nothing here asks for the backend "cpu".
PURE_TESTS = ("tests/test_reference.py", "tests/test_metrics.py")
NEEDED = ("numpy", "scipy", "pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6")


def run(*command, cwd):
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def quick_tests():
    """The files of `make test-quick`, by the Makefile's own list."""
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("QUICK_TESTS :="))
    return line.split(":=")[1].split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=pathlib.Path, help="a wheel")
    parser.add_argument("torch", nargs="+", help="what pip installs as torch, like torch==2.11.0")
    given = parser.parse_args()
    package = given.package.resolve(strict=True)
    compiled = "none-any" not in package.name
    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        venv.create(where / "venv", with_pip=True)
        python = where / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", *given.torch, *NEEDED, cwd=where)
        run(python, "-m", "pip", "install", "-q", "--no-deps", package, cwd=where)
        # Away from the checkout, whose package would be imported instead.
        shutil.copytree(ROOT / "tests", where / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", where)
        check = (
            "import tversky_kernels as tk; "
            f"assert tk.__file__.startswith({os.fspath(where)!r}), tk.__file__; "
            f"assert (tk.available_backends()['cpu'] is True) == {compiled}, tk.available_backends()"
        )
        run(python, "-c", check, cwd=where)
        run(python, "-m", "tversky_kernels", cwd=where)
        tests = quick_tests() if compiled else PURE_TESTS
        run(python, "-m", "pytest", "-q", "-n", os.cpu_count() or 1, "-m", "not slow", *tests, cwd=where)
    print(f"{package.name}: works with Python {sys.version.split()[0]} and {' '.join(given.torch)}")


if __name__ == "__main__":
    main()
