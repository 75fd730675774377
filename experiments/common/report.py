"""Report of a study: one HTML page that holds its figures and tables, and the same as files beside it.

report = Report("OCR heads of toy-qwen2-vl")
report.answer = ["One of eight heads is an OCR head."]
report.section("Scores", "How the heads were scored.")
report.figure("heatmap", figure, "OCR score of every head")
report.table("scores", frame, "Every head's score", shown=20)
report.write(out, record)
"""

import json
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from hooked_vlm.experiments.common.figures import SINGLE, save_figure
from hooked_vlm.experiments.common.finding import Finding
from hooked_vlm.experiments.common.tables import Table, data_url
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.view import page_file

SOFTWARE = "hooked_vlm: Qwen2-VL and InternVL2 with a hook on every intermediate tensor"
"""Title to cite, that of CITATION.cff."""
PIXELS_PER_INCH = 96
"""CSS pixels of a figure's inch."""


@dataclass(frozen=True)
class _FigurePart:
    name: str
    caption: str
    number: int


@dataclass
class _Section:
    heading: str
    parts: list[str | _FigurePart] = field(default_factory=list)
    """Paragraphs and figures, in the order they were added."""
    tables: list[Table] = field(default_factory=list)

    def shown(self, raw: bool) -> list[Table]:
        return [table for table in self.tables if table.is_raw == raw]


class Report:
    """Collects sections of text, figures and tables.

    The page begins with the answer; then come the sections' paragraphs and figures, then their tables; raw tables and
    the run's configuration are folded away at the end.
    """

    def __init__(self, title: str, lead: str = "", command: str = "", paper: str = "") -> None:
        """`command` repeats the run; `paper` is the reference of the paper whose experiments these are."""
        self.title, self.lead, self.command, self.paper = title, lead, command, paper
        self.answer: list[str] = []
        """Three to five sentences, shown before everything else: the answer to the study's question."""
        self._sections: list[_Section] = []
        self._figures: dict[str, Figure] = {}
        self._tables: dict[str, Table] = {}

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begin a section with paragraphs of plain text."""
        self._sections.append(_Section(heading))
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs of plain text."""
        self._sections[-1].parts += paragraphs

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
        """Add a figure; `write` also saves it as figures/`name`.png, .svg and .pdf."""
        self._figures[name] = figure
        self._sections[-1].parts.append(_FigurePart(name, caption, len(self._figures)))

    def table(self, name: str, frame: pd.DataFrame, caption: str, shown: int | None = None) -> None:
        """Add a sortable table of the first `shown` rows; `write` saves all rows as tables/`name`.parquet and .csv.

        A table that shows 10 rows or fewer of those it has is raw data and comes last. A column of pictures (PIL
        images or arrays) is shown as thumbnails and left out of the files. Nothing is shown of a table without rows.
        """
        table = Table(name, frame, caption, shown)
        self._tables[name] = table
        if len(frame):
            self._sections[-1].tables.append(table)
        else:
            self.text(f"{caption}: there is nothing to show.")

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """Tables by name, with all rows."""
        return {name: table.frame for name, table in self._tables.items()}

    def write(self, out: Path, record: Mapping[str, Any], zipped: bool = False) -> Path:
        """Write report.html, figures/, tables/ and run.json (`record`: configuration, versions, counts).

        Args:
            zipped: also pack them all into report.zip, as happens where there is one already.

        Returns:
            Path of report.html.

        Raises:
            OutputError: the folder cannot be written.
        """
        written = [path for table in self._tables.values() for path in table.write(out / "tables")]
        pictures = {}
        for name, figure in self._figures.items():
            rendered = save_figure(figure, out / "figures" / name)
            written += [out / "figures" / (name + suffix) for suffix in rendered.files]
            pictures[name] = {
                "light": data_url(rendered.light, "image/svg+xml"),
                "dark": data_url(rendered.dark, "image/svg+xml"),
                "width": round(rendered.width * PIXELS_PER_INCH),
                "single": rendered.width <= SINGLE + 0.1,
            }
        text = json.dumps(record, indent=2) + "\n"
        page = self._page(record, text, pictures)
        for path, content in ((out / "run.json", text), (out / "report.html", page)):
            atomic_write(path, lambda aside, content=content: aside.write_text(content, encoding="utf-8"))
            written.append(path)
        if zipped or (out / "report.zip").exists():
            atomic_write(out / "report.zip", lambda aside: _pack(aside, out, written))
        return out / "report.html"

    def _page(self, record: Mapping[str, Any], text: str, pictures: Mapping[str, Any]) -> str:
        template = resources.files(str(__package__)).joinpath("report.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["prose"] = _prose
        software = version("hooked-vlm")
        return environment.from_string(template).render(
            report=self,
            sections=self._sections,
            numbers=self._numbers(),
            pictures=pictures,
            facts=_facts(record),
            software=f"The hooked_vlm authors. {SOFTWARE}. Version {software}.",
            record=text,
            look=page_file("look.css"),
        )

    def _numbers(self) -> dict[str, int]:
        """Number of each table by name, in the order they appear: raw ones last."""
        order = [t.name for raw in (False, True) for section in self._sections for t in section.shown(raw)]
        return {name: i for i, name in enumerate(order, 1)}


def files_of(page: Path) -> dict[str, Any]:
    """Paths of a written report, its run.json and its tables, for --json."""
    tables = {path.stem: str(path) for path in sorted((page.parent / "tables").glob("*.parquet"))}
    packed = {"zip": str(page.parent / "report.zip")} if (page.parent / "report.zip").exists() else {}
    return {"report": str(page), "run": str(page.parent / "run.json"), "tables": tables, **packed}


def _prose(text: str) -> Markup:
    """Text with its `code` in a fixed-width font."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What heads the page: model, date of the run (that of SOURCE_DATE_EPOCH if set), versions."""
    now = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), UTC)
    versions = record.get("versions", {})
    weights = f" (weights {record['weights']})" if "weights" in record else ""
    facts = {
        "Model": f"{record.get('model', '')}{weights}",
        "Precision": " on ".join(str(record[name]) for name in ("dtype", "device") if name in record),
        "Date": f"{now.day} {now:%B %Y}",
        "Software": ", ".join(f"{name} {versions[name]}" for name in ("hooked-vlm", "torch") if name in versions),
    }
    return {name: value for name, value in facts.items() if value}


def _pack(aside: Path, out: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(files):
            # no time of day in it: reruns give the same bytes
            entry = zipfile.ZipInfo(f"{out.resolve().name}/{file.relative_to(out).as_posix()}")
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            packed.writestr(entry, file.read_bytes())
