"""Each package imports only from those before it in ORDER, wherever in a module the import stands."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "art_pixeldefend"
TOOLS = (
    "levels", "validation", "files", "image_files", "pictures", "batches", "precision", "processes", "datasets",
)  # fmt: skip
ORDER = ("tools", "models", "purifiers", "detectors", "attacks", "classifiers", "evaluation", "cli")
PAPER = f"{NAME}.evaluation.paper"


def modules(folder):
    """The source of every module under the package's folder, by dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (NAME, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def unit(module):
    """The module or package directly below the root that a module belongs to; the root is its own."""
    return module.split(".")[1] if "." in module else NAME


def layer(module):
    """The position in ORDER, or None for the root, which re-exports the public names, and ``__main__``."""
    name = unit(module)
    if name in (NAME, "__main__"):
        return None
    name = "tools" if name in TOOLS else name
    assert name in ORDER, f"{module} is in no package of the layout: add it to ORDER and to CONTRIBUTING.md"
    return ORDER.index(name)


def public_names(source):
    """Where the root takes its public names from: name -> module, from its imports for type checkers."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module for node in nodes for alias in node.names if (node.module or "").startswith(NAME)}


def imported(module, source, known):
    """The modules of the package that a module imports, in any function or branch, or names in a string.

    A string counts if it is the dotted path of a module or of a name in one: such paths are imported later.
    """
    exported = public_names(known[NAME])
    package = module if any(name.startswith(f"{module}.") for name in known) else module.rpartition(".")[0]
    paths = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            paths |= {exported.get(alias.name, NAME) if base == NAME and f"{NAME}.{alias.name}" not in known
                      else f"{base}.{alias.name}" for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{NAME}(\.\w+)+", str(node.value)):
            paths.add(node.value)
    found = {next((p for p in prefixes(path) if p in known), None) for path in paths}
    return found - {None, module}


def prefixes(path):
    """A dotted path and everything above it, longest first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def upward(known):
    """Every import against the order, as 'importer -> imported'."""
    return [
        f"{module} -> {other}"
        for module, source in known.items()
        if layer(module) is not None
        for other in sorted(imported(module, source, known))
        if layer(other) is not None and layer(other) > layer(module)
    ]


def of_the_paper(known):
    """Every import of ``evaluation.paper`` by another module of ``evaluation``, as 'importer -> imported'."""
    return [
        f"{module} -> {other}"
        for module, source in known.items()
        if unit(module) == "evaluation" and not below(module, PAPER)
        for other in sorted(imported(module, source, known))
        if below(other, PAPER)
    ]


def below(module, package):
    return module == package or module.startswith(f"{package}.")


def untraceable(known):
    """Every import that ``imported`` cannot follow, as 'module: statement'."""
    found = []
    for module, source in known.items():
        tree = ast.parse(source)
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == NAME
        }
        for node in ast.walk(tree):
            star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
            if star and (node.level or below(node.module, NAME)):
                found.append(f"{module}: {ast.unparse(node)}")
            attribute = isinstance(node, ast.Attribute) and node.attr != "__version__"
            if attribute and isinstance(node.value, ast.Name) and node.value.id in aliases:
                found.append(f"{module}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                name = node.args[0] if node.args else None
                relative = isinstance(name, ast.Constant) and str(name.value).startswith(".")
                if len(node.args) + len(node.keywords) > 1 or relative or isinstance(name, (ast.JoinedStr, ast.BinOp)):
                    found.append(f"{module}: {ast.unparse(node)}")
    return found


def cycles(known):
    """A cycle between the packages and modules directly below the root, or none."""
    graph = {}
    for module, source in known.items():
        if layer(module) is not None:
            others = {unit(other) for other in imported(module, source, known)} - {unit(module), NAME}
            graph.setdefault(unit(module), set()).update(others)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def package():
    return modules(ROOT / NAME)


def test_no_package_imports_from_a_later_one(package):
    assert upward(package) == []


def test_no_packages_import_each_other(package):
    assert cycles(package) == []


def test_general_evaluation_does_not_import_the_paper(package):
    assert of_the_paper(package) == []
    changed = {f"{NAME}.evaluation.grid": "from art_pixeldefend.evaluation.paper import grids"}
    assert of_the_paper(package | changed) == [f"{NAME}.evaluation.grid -> {PAPER}.grids"]


def test_every_import_can_be_followed(package):
    root = package[NAME]
    assert "import_module(f" in root  # of the public names, which are followed by ``public_names``
    assert untraceable({name: source for name, source in package.items() if name != NAME}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import art_pixeldefend as a; a.PixelDefend",
        "import art_pixeldefend; art_pixeldefend.PixelDefend",
        "from art_pixeldefend import *",
        "from .purifiers import *",
        "import_module('.purifiers', 'art_pixeldefend')",
        "import_module(f'{__package__}.purifiers')",
        "importlib.import_module(__package__ + '.purifiers')",
    ],
)
def test_an_import_that_cannot_be_followed_is_found(source):
    assert len(untraceable({f"{NAME}.levels": source})) == 1


def test_contributing_shows_the_order_that_is_checked():
    table = re.findall(r"^\| (`[^|]*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rows = [re.findall(r"`(\w+?)(?:/|\.py)`", cell) for cell in table if "/`" in cell or ".py`" in cell]
    assert (tuple(rows[0]), *(row[0] for row in rows[1 : len(ORDER)])) == (TOOLS, *ORDER[1:])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("levels", "from art_pixeldefend.models import zoo"),
        ("levels", "from art_pixeldefend import models"),
        ("levels", "from art_pixeldefend import PixelDefend"),
        ("levels", "from .models import zoo"),
        ("models.zoo", "import art_pixeldefend.purifiers"),
        ("models.zoo", "from ..purifiers import base"),
        ("models.zoo", "KINDS = {'score': 'art_pixeldefend.purifiers.base.Purifier'}"),
        ("attacks.registry", "from art_pixeldefend.evaluation.grid import Row"),
        ("evaluation.grid", "from art_pixeldefend import cli"),
    ],
)
@pytest.mark.parametrize("where", ["{}", "def function():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_an_upward_import_is_found(package, module, line, where):
    name = f"{NAME}.{module}"
    changed = package | {name: f"{package[name]}\n{where.format(line)}\n"}
    assert [found.partition(" -> ")[0] for found in upward(changed)] == [name]


def test_a_cycle_of_tools_is_found(package):
    names = [f"{NAME}.{tool}" for tool in ("levels", "validation")]
    changed = package | {
        name: f"{package[name]}\nimport {other}\n" for name, other in zip(names, names[::-1], strict=True)
    }
    assert {"levels", "validation"} <= set(cycles(changed))


def test_a_module_outside_the_layout_is_found(package):
    with pytest.raises(AssertionError, match="CONTRIBUTING"):
        upward(package | {f"{NAME}.helpers": ""})
