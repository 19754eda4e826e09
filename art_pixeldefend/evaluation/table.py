"""Tables of accuracies with confidence intervals, beside published ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Grid, Row
from art_pixeldefend.evaluation.preprocessors import CALIBRATED, placeholders
from art_pixeldefend.evaluation.threat import BLIND, WHITE_BOX

Results = Mapping[Cell, Mapping[str, Any]]
STRONGEST, WORST_CASE = "strongest", "worst case"


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval for a proportion (1927), each end in 0..1."""
    if not count:
        return 0.0, 1.0
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int | None = None) -> str:
    """Rows as a Markdown table.

    Args:
        head: titles of the columns.
        rows: cells of each row.
        left: how many columns are text, aligned left, before those of numbers, aligned right; by default all.

    Example:
        >>> print(markdown_table(["defence", "accuracy"], [["none", 7]], left=1), end="")
        | defence | accuracy |
        | --- | --: |
        | none | 7 |
    """
    left = len(head) if left is None else left
    lines = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def entries(grid: Grid, results: Results) -> list[dict[str, Any]]:
    """Return every number of the table as a flat record, including the derived columns.

    ``strongest`` is the accuracy under the row's strongest attack, as in the paper; ``worst case`` counts an image as
    correct only if it is correct under all attacks.
    """
    records = []
    for row in grid.rows:
        for eps in grid.eps_of(row):
            columns = {name: cell for name, cell in _columns(grid, row, eps).items() if cell in results}
            for name, cell in columns.items():
                records.append(_record(grid, row, eps, name, results[cell]))
            records += _derived(grid, row, eps, {n: results[c] for n, c in columns.items() if n != CLEAN})
    return records


def _columns(grid: Grid, row: Row, eps: int) -> dict[str, Cell]:
    return {CLEAN: Cell(row, CLEAN, 0)} | {name: Cell(row, name, eps) for name in grid.attacks_of(row)}


def _record(grid: Grid, row: Row, eps: int, column: str, result: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        "dataset": grid.dataset, "network": row.network, "training": row.training, "delta": grid.delta_of(row),
        "defence": row.defence, "threat": row.threat.name, "eps": eps, "column": column,
        "count": result.get("count", 0),
        "ours": result.get("accuracy_percent"), "low": None, "high": None,
        "paper": grid.paper(grid, row, column, eps) if grid.paper else None, "difference": None,
        "error": result.get("error", ""),
    }  # fmt: skip
    if "interval_percent" in result:
        record["low"], record["high"] = result["interval_percent"]
    if record["ours"] is not None and record["paper"] is not None:
        record["difference"] = record["ours"] - record["paper"]
    return record


def _derived(grid: Grid, row: Row, eps: int, attacked: Results | Mapping[str, Any]) -> list[dict[str, Any]]:
    done = [result for result in attacked.values() if "right" in result]
    if not done or len(done) < len(attacked):  # the minimum over fewer attacks would be too high
        return []
    weakest = min(done, key=lambda result: result["accuracy_percent"])
    right = [set(flags) == {"1"} for flags in zip(*(result["right"] for result in done), strict=True)]
    low, high = wilson(sum(right), len(right))
    percent = 100 * float(np.mean(right))
    worst = {"count": len(right), "accuracy_percent": percent, "interval_percent": [100 * low, 100 * high]}
    return [_record(grid, row, eps, STRONGEST, weakest), _record(grid, row, eps, WORST_CASE, worst)]


def comma_separated(grid: Grid, results: Results) -> str:
    """Return the table as CSV with one number per line, in percent."""
    records = entries(grid, results)
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else ["dataset"], lineterminator="\n")
    writer.writeheader()
    for record in records:
        shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in record.items()}
        writer.writerow(shown | {"error": record["error"].splitlines()[0] if record["error"] else ""})
    return file.getvalue()


def markdown(grid: Grid, results: Results) -> str:
    """Return the table as Markdown, one part per radius, with the paper's numbers where there are any."""
    records = entries(grid, results)
    names = [CLEAN, *(a for a in ATTACKS if any(record["column"] == a for record in records)), STRONGEST, WORST_CASE]
    titles = [ATTACKS[name].title if name in ATTACKS else name for name in names]
    head, lines = ["classifier, training, defence", "threat", *titles], []
    for eps in (eps for eps in grid.eps if any(eps in grid.eps_of(row) for row in grid.rows)):
        rows = []
        for row in (row for row in grid.rows if eps in grid.eps_of(row)):
            of_row = {r["column"]: r for r in records if r["eps"] == eps and _is_of(grid, row, r)}
            cells = [_shown(of_row.get(name)) for name in names]
            rows.append([f"{title(row)}, {row.defence}", row.threat.name, *cells])
        lines += [f"## Attacks within {eps} levels", "", markdown_table(head, rows)]
    return "\n".join(lines + _notes(grid, results)) + "\n"


def title(row: Row) -> str:
    """Return a row's classifier in words."""
    return f"{row.network}, {row.training}" + ("" if row.delta is None else f" (delta {row.delta:g})")


def _is_of(grid: Grid, row: Row, record: Mapping[str, Any]) -> bool:
    same = all(record[name] == getattr(row, name) for name in ("network", "training", "defence"))
    return same and record["threat"] == row.threat.name and record["delta"] == grid.delta_of(row)


def _shown(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if record["ours"] is None:
        return "failed"
    ours = f"**{record['ours']:.1f}**"
    return ours if record["paper"] is None else f"{ours} ({record['paper']:.0f}, {record['difference']:+.1f})"


THREAT_NOTES = {
    BLIND: "the attacks see the classifier without the defence. The accuracy says nothing about an attacker who knows "
    "of the defence.",
    WHITE_BOX: "the attacks see classifier and defence, with the identity as the gradient of a defence that has none "
    "(BPDA). The accuracy is an upper bound: a stronger attack may find more.",
}


def _notes(grid: Grid, results: Results) -> list[str]:
    """Return what readers need to know about the numbers, as a Markdown list."""
    done = [result for result in results.values() if "count" in result]
    width = max((np.abs(np.subtract(r["interval_percent"], r["accuracy_percent"])).max() for r in done), default=0.0)
    notes = ["Accuracy in percent" + (": **ours** (the paper's, ours minus the paper's)." if grid.paper else ".")]
    notes.append(f"95% intervals (Wilson) are at most {width:.1f} points to either side; each is in the CSV file.")
    threats = list(dict.fromkeys(row.threat for row in grid.rows))
    notes += [f"*{threat.name}*: {note}" for threat, note in THREAT_NOTES.items() if threat in threats]
    notes += [f"*{threat.name}*: {threat}." for threat in threats if threat not in THREAT_NOTES]
    notes.append(
        "*strongest* is the least accuracy of the row; *worst case* counts images that are classified correctly under "
        "all attacks."
    )
    counts: dict[int, list[str]] = {}
    for cell, result in results.items():
        if "count" in result:
            counts.setdefault(result["count"], []).append(cell.row.name)
    for count, rows in sorted(counts.items(), reverse=True):
        which = "all rows" if len(counts) == 1 else ", ".join(dict.fromkeys(rows))
        notes.append(f"The first {count} test images: {which}.")
    for name, entry in ATTACKS.items():
        if entry.note and any(cell.attack == name for cell in results):
            notes.append(f"{entry.title}: {entry.note}.")
    for name, note in grid.notes.items():
        if any(row.defence == name for row in grid.rows):
            notes.append(f"{name}: {note}.")
    if any(CALIBRATED in placeholders(grid.defences.get(row.defence, ())) for row in grid.rows):
        which = f"{grid.validation} of the last test images, which no row with a threshold reports"
        notes.append(f"Thresholds are chosen on {which}.")
    if any(row.delta is not None for row in grid.rows):
        notes.append("*delta*: the radii in adversarial training were |N(0, delta)|, in levels.")
    short = [row.name for row in grid.rows if set(grid.attacks_of(row)) < set(grid.attacks)]
    if short:
        notes.append(f"*strongest* and *worst case* are over fewer attacks in {', '.join(short)}.")
    failed = [f"{cell.name}: {r['error'].splitlines()[0]}" for cell, r in results.items() if r.get("error")]
    return [f"- {note}" for note in notes + [f"failed: {line}" for line in failed]]
