"""Who imports whom, read from the source by `ast`, and the floors of the house: imports go down only.

    .venv/bin/python tests/floors.py docs/floors.png

draws them: a box is what lies at the top of a package, lines lead down to what it imports and has not already below it.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {  # of what lies in a folder, from the ground; what shares a floor does not see each other
    "sim": "world engine / drafting / policies / simulation / reading / studies validation",
    "flashmoe_numba": "errors / processes device checkpoints / gpu tile_gemm / kernel / heap seeing / build / "
    "backends ptx / layer / bench torch / explore / commands / cli / __main__",
    "flashmoe_numba/explore": "run / choose backward_worlds / host_worlds / worlds / plants / search / "
    "exhaustive hunt tell",
}


@cache  # by the text: tests that plant an import read all other files again and again
def imports(source: str, package: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(dotted name, what is taken from it or ""), for all imports of a module of this package.

    An import inside a function or under TYPE_CHECKING counts like any other.
    """
    return tuple(_imports(ast.parse(source), package))


def _imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((arg.value, "") for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imported_names(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute dotted names; `from a import b` gives `a` and `a.b`, as b may be a module."""
    found = imports(source, package)
    return {base for base, _ in found} | {f"{base}.{name}".lstrip(".") for base, name in found if name}


def arrows(root: Path, package: str) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, by dotted names."""
    files = {_dotted(file.relative_to(root)): file for file in sorted((root / package).rglob("*.py"))}
    found = {}
    for name, file in files.items():
        pairs = imports(file.read_text(encoding="utf-8"), file.relative_to(root).parent.parts)
        targets = (f"{base}.{taken}" if f"{base}.{taken}" in files else base for base, taken in pairs)
        found[name] = {target for target in targets if target in files}
    return found


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def heights(folder: str) -> dict[str, int]:
    """The floor of each entry of a folder."""
    return {name: height for height, names in enumerate(FLOORS[folder].split("/")) for name in names.split()}


def between(root: Path, folder: str) -> dict[tuple[str, str], list[str]]:
    """For each two entries of a folder, the imports from the one to the other: {(above, below): lines}."""
    inside, found = folder.replace("/", ".") + ".", {}
    for module, imported in arrows(root, folder.split("/")[0]).items():
        for other in sorted(imported):
            if module.startswith(inside) and other.startswith(inside):
                above, below = (name.removeprefix(inside).split(".")[0] for name in (module, other))
                if above != below:
                    found.setdefault((above, below), []).append(f"{module} imports {other}")
    return found


def upward(root: Path, folder: str) -> list[str]:
    """One line per import between two entries of the folder that does not go down, or whose floor is not known."""
    floor = heights(folder)
    wrong = [
        lines
        for (above, below), lines in between(root, folder).items()
        if not {above, below} <= set(floor) or floor[above] <= floor[below]
    ]
    return sorted(line for lines in wrong for line in lines)


def needed(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those (above, below) that do not follow from others, so that a picture stays readable."""
    below: dict[str, set[str]] = {}
    for upper, lower in pairs:
        below.setdefault(upper, set()).add(lower)

    def reaches(start: str, end: str) -> bool:
        return any(mid == end or reaches(mid, end) for mid in below.get(start, ()))

    return {(x, z) for x, z in pairs if not any(y != z and reaches(y, z) for y in below[x])}


def draw(file: str) -> None:
    """The floors of both packages side by side, each box with the beginning of its docstring."""
    import matplotlib.pyplot as plt

    folders = [folder for folder in FLOORS if "/" not in folder]
    figure, axes = plt.subplots(1, len(folders), figsize=(14, 9), layout="constrained")
    for axis, folder in zip(axes, folders, strict=True):
        draw_folder(axis, folder)
    figure.savefig(file, dpi=90)


def draw_folder(axis, folder: str) -> None:
    floor, places = heights(folder), {}
    for names in FLOORS[folder].split("/"):
        for i, name in enumerate(names.split()):
            places[name] = ((i + 1) / (len(names.split()) + 1), floor[name])
    down = {(above, below) for above, below in between(ROOT, folder) if floor[above] > floor[below]}
    for above, below in needed(down):
        axis.annotate("", places[below], places[above], arrowprops=dict(arrowstyle="-", color="0.6"))
    for name, (x, y) in places.items():
        text = f"{name}\n{textwrap.fill(purpose(ROOT / folder / name), 44)}"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, bbox=dict(boxstyle="round", fc="white", ec="0.4"))
    axis.set(title=folder + "/", xlim=(0, 1), ylim=(-0.7, max(floor.values()) + 0.7))
    axis.axis("off")


def purpose(place: Path) -> str:
    """How the docstring of a package or module begins."""
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return re.split(r"[.:;]( |$)", str(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))))[0]


if __name__ == "__main__":
    draw(sys.argv[1])
