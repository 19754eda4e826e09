"""Configuration of the documentation site: ``sphinx-build -W -n -b html docs docs/_build``."""

import re
import shutil
import sys
from pathlib import Path
from pydoc import locate
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.nodes import make_refnode

import art_pixeldefend

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "_generated"

project = "art-pixeldefend"
author = copyright = "The art-pixeldefend authors"
version = release = art_pixeldefend.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = "art-pixeldefend"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings state types with shapes and units
autodoc_inherit_docstrings = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Pages of the repository that the site shows as they are: source -> page.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.md")
    },
    **{
        str(path.relative_to(ROOT)): f"models/{path.name}"
        for path in sorted((ROOT / "art_pixeldefend").glob("*/weights/*.md"))
    },
}


def relinked(text: str, source: str) -> str:
    """A page's text with links that work in the site: to other pages and pictures; links to other files become text."""

    def link(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.groups()
        if target.startswith(("http:", "https:")) or not target:
            return match[0]
        path = ((ROOT / source).parent / target).resolve()
        name = str(path.relative_to(ROOT))
        if name in PAGES:
            return f"[{label}](/_generated/{PAGES[name]}{anchor or ''})"
        if path.suffix == ".png":
            copy = GENERATED / "pictures" / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            return f"{mark}[{label}](/_generated/pictures/{path.name})"
        return label

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)#]*)(#[^)]*)?\)", link, text)


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"there is no section {heading!r}")
    return found[1]


def rows(text: str, script: str) -> str:
    """The rows of the table of purifiers that a script measured, with the header and without the first column."""
    lines = [line.split(" | ", 1) for line in section(text, "Other purifiers").splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line[0] == "| script")
    shown, current = [line[1] for line in lines[start : start + 2]], ""
    for first, rest in lines[start + 2 :]:
        if first == "| ---":
            break
        current = first.strip("| ") or current
        if script in current:
            shown.append(rest)
    if len(shown) < 3:
        raise ValueError(f"benchmarks/README.md has no rows of {script}")
    return "\n".join(f"| {line}" for line in shown) + "\n"


def adaptive(text: str, purifier: str) -> str:
    """The rows of a purifier in the tables of adaptive attacks, under their headings as captions."""
    tables = re.findall(r"^## (Within .*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    shown = []
    for caption, table in tables:
        header, rule, *body = [line for line in table.splitlines() if line.startswith("|")]
        mine = [line for line in body if f"| {purifier}" in line]
        shown += [f"{caption}:", "", header, rule, *mine, ""] if mine else []
    return "\n".join(shown or ["Not measured yet."]) + "\n"


ATTACKED = (
    "PixelDefend", "Adaptive PixelDefend", "ScorePurifier", "ScoreDenoiser", "ManifoldProjection", "DeepImagePrior",
)  # fmt: skip


def write(name: str, content: str) -> None:
    """Write a generated file."""
    path = GENERATED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def generate() -> None:
    """Write the pages of ``PAGES``, the parts of them that other pages include, and copies of all pictures."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    for source, page in PAGES.items():
        title, _, text = relinked((ROOT / source).read_text(), source).partition("\n")
        if page.startswith("results/"):  # some have equal titles
            title += f" ({Path(page).stem})"
        write(page, f"{title}\n{text}")
    benchmarks = relinked((ROOT / "benchmarks/README.md").read_text(), "benchmarks/README.md")
    for heading in ("Fashion-MNIST", "Detection", "Decoding speed"):
        write(f"parts/{heading.lower().replace(' ', '-')}.md", section(benchmarks, heading))
    for script in ("score_purification", "manifold_defense", "deep_image_prior"):
        write(f"parts/{script}.md", rows(benchmarks, script))
    attacked = (ROOT / "benchmarks/results/adaptive-evaluation.md").read_text()
    for purifier in ATTACKED:
        write(f"parts/adaptive/{purifier.replace(' ', '')}.md", adaptive(attacked, purifier))
    models = section(relinked((ROOT / "README.md").read_text(), "README.md"), "Models")
    write("parts/models.md", "\n".join(line for line in models.splitlines() if line.startswith("|")) + "\n")
    (GENERATED / "pictures").mkdir(exist_ok=True)
    for picture in (ROOT / "benchmarks/results").glob("*.png"):
        shutil.copy(picture, GENERATED / "pictures" / picture.name)


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show the bars of norms in docstrings as they are: reStructuredText takes them for substitutions."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith(("| ", ">>>", "...")):
            parts = line.split("``")
            lines[i] = "``".join(part if k % 2 else part.replace("|", "\\|") for k, part in enumerate(parts))


def found(name: str) -> Any:
    """The imported thing of a dotted name, or None; also in a module that a function of its name hides."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        thing = sys.modules.get(".".join(parts[:k]))
        for part in parts[k:]:
            thing = getattr(thing, part, None)
        if thing is not None:
            return thing
    return locate(name)


def resolve(app: Any, environment: Any, node: Any, text: Any) -> nodes.Node | None:
    """Link a reference in a docstring to the thing that it names, by any of its names; None if there is no such thing.

    Things without a place in the reference are shown without a link.
    """
    if node.get("refdomain") != "py":
        return None
    target, module, owner = node["reftarget"], node.get("py:module") or "", node.get("py:class") or ""
    home = getattr(found(f"{module}.{owner}"), "__module__", module)
    names = [target, f"{home}.{target}", f"{module}.{target}", f"{module}.{owner}.{target}"]
    names += [f"{name}.{target}" for name in sorted(sys.modules) if name.startswith("art_pixeldefend")]
    thing = next((thing for name in names if (thing := found(name)) is not None), None)
    if thing is None:  # napoleon takes the names of several results for types
        return text if node["reftype"] == "class" and "." not in target else None
    domain = environment.domains["py"]
    for name, entry in domain.objects.items():
        if name.rpartition(".")[2] == target.rpartition(".")[2] and found(name) is thing:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, name)
    return text


def write_formula(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(" ".join(node.astext().split()), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Generate pages before Sphinx looks for them."""
    app.add_html_math_renderer("mathml", inline_renderers=(write_formula, None), block_renderers=(write_formula, None))
    app.connect("config-inited", lambda app, config: generate())
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("missing-reference", resolve)
