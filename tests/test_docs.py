"""The code blocks of the README run as they stand, one after the other."""

from __future__ import annotations

import pathlib
import re

import pytest

import tversky_kernels as tk

ROOT = pathlib.Path(__file__).parent.parent


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?", re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, capsys):
    """Each prints what the page says that it prints."""
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks or page != "README.md"
    names: dict = {}
    for block, output in blocks:
        exec(compile(block, page, "exec"), names)
        printed = capsys.readouterr().out
        assert not output or printed == output
        assert output or "/api/" not in page


def test_type_checker_takes_the_python_blocks(tmp_path):
    """A user's type checker reads our annotations (py.typed)."""
    mypy = pytest.importorskip("mypy.api", reason="mypy is not installed")
    for page in PAGES:
        blocks = "".join(block for block, _ in BLOCK.findall((ROOT / page).read_text()))
        (tmp_path / (re.sub(r"\W", "_", page) + ".py")).write_text(blocks)
    given = ["--config-file", str(ROOT / "pyproject.toml"), "--disable-error-code", "no-redef", "--check-untyped-defs"]
    found, _, status = mypy.run([*given, "--follow-imports", "silent", *map(str, tmp_path.iterdir())])
    assert status == 0, found


def test_every_public_name_has_a_page():
    """In the API pages, and no name is there that is not public."""
    text = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: tversky_kernels\.([\w.]+)", text, re.M))
    modules = {f"compat.{name}" for name in tk.compat.__all__}
    assert shown == (set(tk.__all__) - {"compat"}) | modules
    for module in (tk, *(getattr(tk.compat, name) for name in tk.compat.__all__)):
        for name in module.__all__:
            assert isinstance(getattr(module, name), str) or getattr(module, name).__doc__, name


def test_every_page_is_in_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = {f"docs/{page}" for page in re.findall(r"([\w/]+\.md)", navigation)}
    outside = {f"docs/{page}" for page in ("CONTRIBUTING.md", "CHANGELOG.md")}
    assert listed == (set(PAGES) - {"README.md"}) | outside


def sections_of(page):
    """The headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target, section in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), target
        assert not section or section in sections_of(there), f"{target}#{section}"
