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
MARGIN = 2.0  # points by which an attack that sees the defence may be weaker than a blind one without a warning


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

    ``strongest`` is the accuracy under the row's strongest attack, as in the paper. ``worst case`` counts an image as
    correct only if it is correct without an attack and under all attacks, of a row whose attacks see its defence also
    under those of the same defence's blind row.
    """
    records = []
    for row in grid.rows:
        for eps in grid.eps_of(row):
            columns = {name: cell for name, cell in _columns(grid, row, eps).items() if cell in results}
            for name, cell in columns.items():
                records.append(_record(grid, row, eps, name, results[cell]))
            attacked = {n: results[c] for n, c in columns.items() if n != CLEAN}
            others = [results[c] for c in (Cell(row, CLEAN, 0), *_blind(grid, row, eps).values()) if c in results]
            records += _derived(grid, row, eps, attacked, others)
    return records


def _blind(grid: Grid, row: Row, eps: int) -> dict[str, Cell]:
    """The attacked cells, by attack, of the same classifier and defence in the row whose attacks see no defence."""
    for other in grid.rows if row.threat != BLIND else ():
        same = other.classifier == row.classifier and other.defence == row.defence and other.threat == BLIND
        if same and eps in grid.eps_of(other):
            return {attack: Cell(other, attack, eps) for attack in grid.attacks_of(other)}
    return {}


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


def _derived(
    grid: Grid, row: Row, eps: int, attacked: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    done = [result for result in attacked.values() if "right" in result]
    if not done or len(done) < len(attacked):  # the minimum over fewer attacks would be too high
        return []
    weakest = min(done, key=lambda result: result["accuracy_percent"])
    count = weakest["count"]
    done += [result for result in others if result.get("count", 0) >= count]
    right = np.all([_right(result)[:count] for result in done], axis=0)
    low, high = wilson(int(right.sum()), len(right))
    percent = 100 * float(np.mean(right))
    worst = {"count": len(right), "accuracy_percent": percent, "interval_percent": [100 * low, 100 * high]}
    return [_record(grid, row, eps, STRONGEST, weakest), _record(grid, row, eps, WORST_CASE, worst)]


def _right(result: Mapping[str, Any]) -> np.ndarray:
    """Whether each image (N,) is classified correctly."""
    return np.array([flag == "1" for flag in result["right"]])


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
        "*strongest* is the least accuracy of the row; *worst case* counts images that are classified correctly "
        "without an attack and under all attacks, in rows whose attacks see a defence also under those of its blind "
        "row."
    )
    guessing = [entry.title for name, entry in ATTACKS.items() if entry.predictions and _has(results, name)]
    if guessing:
        notes.append(
            f"{', '.join(guessing)}: the classifier's own predictions are attacked, so that an image that is wrong "
            "without an attack may become right."
        )
    notes += _weaker_than_blind(grid, results)
    counts: dict[int, list[str]] = {}
    for cell, result in results.items():
        if "count" in result:
            counts.setdefault(result["count"], []).append(cell.row.name)
    for count, rows in sorted(counts.items(), reverse=True):
        which = "all rows" if len(counts) == 1 else ", ".join(dict.fromkeys(rows))
        notes.append(f"The first {count} test images: {which}.")
    for name, entry in ATTACKS.items():
        if entry.note and _has(results, name):
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


def _has(results: Results, attack: str) -> bool:
    return any(cell.attack == attack for cell in results)


def _weaker_than_blind(grid: Grid, results: Results) -> list[str]:
    """A warning for attacks that see a defence and leave more images than the same ones without sight of it.

    Of the images that are right without an attack; such attacks have poor gradients.
    """
    found = []
    for row in grid.rows:
        for eps in grid.eps_of(row):
            for attack, blind in _blind(grid, row, eps).items():
                cells = Cell(row, attack, eps), blind, Cell(row, CLEAN, 0)
                if ATTACKS[attack].sees_classifier and all("right" in results.get(cell, ()) for cell in cells):
                    count = min(results[cell]["count"] for cell in cells)
                    seeing, blindly, clean = (_right(results[cell])[:count] for cell in cells)
                    kept = [100 * float((right & clean).mean()) for right in (seeing, blindly)]
                    if kept[0] > kept[1] + MARGIN:
                        found.append(f"{cells[0].name} ({kept[0]:.1f}, {kept[1]:.1f} blind)")
    if not found:
        return []
    return [
        "**Weak attacks**: of the images that are right without an attack, these leave more than the same attacks "
        f"without sight of the defence, in percent: {', '.join(found)}."
    ]
