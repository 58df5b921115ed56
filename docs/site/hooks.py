"""Brings what lies outside of docs/ into the site: pictures and two pages; links to other files lead to the source."""

from __future__ import annotations

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files, config):
    """Adds the pictures of the benchmarks, and the pages of the project's first folder."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/results/{picture.name}", abs_src_path=str(picture)))
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes links as they are in the repository into the site's."""
    is_outside = page.file.src_uri in PAGES

    def moved(match):
        written, section = match.groups()
        folder = "" if is_outside else posixpath.join("docs", posixpath.dirname(page.file.src_uri))
        target = posixpath.normpath(posixpath.join(folder, written))  # from the repository's first folder
        inside = target.removeprefix("docs/")
        if files.get_file_from_path(inside) is not None:
            start = posixpath.dirname(page.file.src_uri) or "."
            return f"]({posixpath.relpath(inside, start)}{section or ''})"
        if (ROOT / target).exists():
            return f"]({config.repo_url}/blob/main/{target})"
        return match[0]

    return LINK.sub(moved, markdown)
