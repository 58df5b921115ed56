"""The compiler flags of setup.py, read without running it."""

from __future__ import annotations

import ast
import pathlib

_TREE = ast.parse((pathlib.Path(__file__).parent.parent.parent / "setup.py").read_text())
_VALUES = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in _TREE.body
    if isinstance(node, ast.Assign) and node.targets[0].id in ("KERNEL_FLAGS", "NVCC_FLAGS", "X86_CAPABILITIES")
}
KERNEL_FLAGS: list[str] = _VALUES["KERNEL_FLAGS"]
NVCC_FLAGS: list[str] = _VALUES["NVCC_FLAGS"]
X86_CAPABILITIES: dict[str, list[str]] = _VALUES["X86_CAPABILITIES"]
