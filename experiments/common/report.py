"""Report of a study: one self-contained HTML page beside its figures and tables.

report = Report("OCR heads of toy-qwen2-vl")
report.section("Scores", "One of eight heads is an OCR head.")
report.figure("heatmap", figure, "OCR score of every head")
report.table("scores", frame, "Every head's score", shown=20)
report.write(out, record)
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hooked_vlm.experiments.common.figures import save_figure
from hooked_vlm.experiments.common.finding import Finding
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.view import page_file

CHECKED: dict[str, Any] = {"write_page_checksum": True}
"""Checksums, because `compare` reads the tables again: a flipped bit must raise, not change a number."""


@dataclass
class _Section:
    heading: str
    parts: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """Collects sections of text, figures and tables, in the order they are added."""

    def __init__(self, title: str, lead: str = "", command: str = "", paper: str = "") -> None:
        """`command` repeats the run; `paper` is the reference of the paper whose experiments these are."""
        self.title, self.lead, self.command, self.paper = title, lead, command, paper
        self.answer: list[str] = []
        """Three to five sentences, shown before everything else: the answer to the study's question."""
        self._sections: list[_Section] = []
        self._figures: dict[str, Figure] = {}
        self._tables: dict[str, pd.DataFrame] = {}

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begin a section with paragraphs of plain text."""
        self._sections.append(_Section(heading))
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs of plain text."""
        self._sections[-1].parts += [{"kind": "text", "text": text} for text in paragraphs]

    def finding(self, finding: Finding) -> None:
        """Add the section of a finding; its sentences go to `answer`, which the study composes."""
        self.section(finding.heading, *finding.paragraphs)
        if not finding.tables:
            self.text(*finding.lines)
        for name, (figure, caption) in finding.figures.items():
            self.figure(name, figure, caption)
        for name, (frame, caption, shown) in finding.tables.items():
            self.table(name, frame, caption, shown)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Add a figure; `write` also saves it as figures/`name`.png and .svg."""
        self._figures[name] = figure
        self._sections[-1].parts.append({"kind": "figure", "name": name, "caption": caption})

    def table(self, name: str, frame: pd.DataFrame, caption: str, shown: int | None = None) -> None:
        """Add a sortable table of the first `shown` rows; `write` saves all rows as tables/`name`.parquet."""
        self._tables[name] = frame
        visible = frame if shown is None else frame.head(shown)
        more = f" ({len(visible)} of {len(frame)} rows)" if len(visible) < len(frame) else ""
        self._sections[-1].parts.append(
            {
                "kind": "table",
                "name": name,
                "caption": caption + more,
                "columns": [str(column) for column in visible.columns],
                "rows": [[_cell(value) for value in row] for row in visible.itertuples(index=False)],
            }
        )

    def write(self, out: Path, record: Mapping[str, Any], zipped: bool = False) -> Path:
        """Write report.html, figures/, tables/ and run.json (`record`: configuration, versions, counts).

        Returns:
            Path of report.html.

        Raises:
            OutputError: the folder cannot be written.
        """
        for name, frame in self._tables.items():
            atomic_write(
                out / "tables" / f"{name}.parquet", lambda aside, f=frame: f.to_parquet(aside, index=False, **CHECKED)
            )
        for name, figure in self._figures.items():
            save_figure(figure, out / "figures" / name)
        text = json.dumps(record, indent=2) + "\n"
        atomic_write(out / "run.json", lambda aside: aside.write_text(text, encoding="utf-8"))
        pictures = {
            name: base64.b64encode((out / "figures" / f"{name}.png").read_bytes()).decode() for name in self._figures
        }
        template = resources.files(str(__package__)).joinpath("report.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(template).render(
            title=self.title,
            lead=self.lead,
            answer=self.answer,
            sections=self._sections,
            pictures=pictures,
            record=text,
            look=page_file("look.css"),
        )
        atomic_write(out / "report.html", lambda aside: aside.write_text(page, encoding="utf-8"))
        return out / "report.html"


def files_of(page: Path) -> dict[str, Any]:
    """Paths of a written report, its run.json and its tables, for --json."""
    tables = {path.stem: str(path) for path in sorted((page.parent / "tables").glob("*.parquet"))}
    return {"report": str(page), "run": str(page.parent / "run.json"), "tables": tables}


def _cell(value: Any) -> dict[str, Any]:
    """Displayed text and sort key of a table cell."""
    if isinstance(value, bool | np.bool_):
        return {"shown": "yes" if value else "", "key": int(value)}
    if isinstance(value, int | np.integer):
        return {"shown": f"{int(value):,}", "key": int(value), "number": True}
    if isinstance(value, float | np.floating):
        return {"shown": "–" if np.isnan(value) else f"{value:.4g}", "key": float(value), "number": True}
    return {"shown": str(value), "key": str(value)}
