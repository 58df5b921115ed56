"""A CSV file of results, to which every run appends its rows."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence


class ResultsTable:
    """Rows with these fields; a file that is there already must have the same."""

    def __init__(self, path: pathlib.Path, fields: Sequence[str]):
        self.path, self.fields = path, list(fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with open(path, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.fields)
            return
        with open(path, newline="") as file:
            found = next(csv.reader(file), [])
        if found != self.fields:
            raise ValueError(f"{path}: expected the columns {self.fields}, found {found}")

    def append(self, rows: Sequence[dict]) -> None:
        """Adds them now: a run that is cut short keeps what it has measured. A field that a row lacks stays empty."""
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, restval="", lineterminator="\n")
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
