"""Self-contained HTML pages of pictures, tables and text, which a browser opens from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from os import PathLike

import numpy as np
from PIL import Image

from art_pixeldefend.files import write_atomically
from art_pixeldefend.pictures import as_picture

STYLE = """
:root { color-scheme: light; --line: #d5d8dc; --soft: #f4f5f7; --right: #1a7f37; --wrong: #c62828; }
* { box-sizing: border-box; }
body { font: 1rem/1.55 system-ui, sans-serif; color: #1d2126; background: #fff; margin: 0 auto; max-width: 66rem;
  padding: 1rem 1.25rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:first-child { background: var(--soft); }
@media (max-width: 32rem) { table { font-size: .78rem; } th, td { padding: .3rem .28rem; } }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; color: #4a5159; max-width: 46rem; }
.charts img { max-width: min(100%, 31rem); height: auto; vertical-align: top; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: .9rem 2rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .35rem; margin: 0;
  text-align: center; font-size: .76rem; line-height: 1.25; }
.row img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.row .name { color: #4a5159; display: block; } .right { color: var(--right); } .wrong { color: var(--wrong); }
"""


def write_page(path: str | PathLike[str], title: str, parts: Iterable[str]) -> None:
    """Write a page with this title, also its heading, and these parts: HTML as the functions below return it."""
    body = "\n".join(parts)
    write_atomically(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n",
    )


def heading(text: str) -> str:
    """Return a heading below the title."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph; what stands between backticks is set as code."""
    return f"<p>{_marked(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    """Return a list; what stands between backticks is set as code."""
    return "<ul>" + "".join(f"<li>{_marked(item)}</li>" for item in items) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts, which scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def charts(pngs: Iterable[bytes], caption: str) -> str:
    """Return pictures (PNG files) side by side, where they fit, with one caption."""
    pictures = "".join(f'<img src="{_data(png)}" alt="{escape(caption)}">' for png in pngs)
    return f'<figure class="charts">{pictures}<figcaption>{_marked(caption)}</figcaption></figure>'


def image_rows(rows: Iterable[Sequence[tuple[np.ndarray, str, str, bool | None]]]) -> str:
    """Return rows of small pictures side by side.

    Args:
        rows: for each picture its levels (C, H, W), uint8, C 1 or 3; its name; a line below it; and whether that line
            is right (green), wrong (red) or neither (None).
    """
    kinds = {True: "right", False: "wrong", None: "neither"}
    cells = [
        "".join(
            f'<div><span class="name">{escape(name)}</span><img src="{_data(_png(levels))}" alt="{escape(name)}">'
            f'<span class="{kinds[right]}">{escape(line)}</span></div>'
            for levels, name, line, right in row
        )
        for row in rows
    ]
    return '<div class="rows">' + "".join(f'<div class="row">{row}</div>' for row in cells) + "</div>"


def _marked(text: str) -> str:
    parts = escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _png(levels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(as_picture(levels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
