"""A page of all figures in a folder, `index.html`: it needs the pictures beside it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Figures of a sweep, simulated</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1100px; padding: 20px 24px 60px; font: 15px/1.5 system-ui, sans-serif; }
figure { margin: 28px 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
nav ul { columns: 3 240px; }
nav li { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Figures of a sweep, simulated</h1>
"""


def write_index(folder: Path, titles: Mapping[Path, str], notes: Sequence[str]) -> Path:
    """Write the page.

    Args:
        titles: of the pictures, files of this folder, in their order.
        notes: sentences about what is not drawn.
    """
    items = [f'<li><a href="#{_id(file)}">{escape(file.stem)}</a></li>' for file in titles]
    parts = ["<nav><ul>", *items, "</ul></nav>", *(_figure(file, title) for file, title in titles.items())]
    parts += ["<h2>Not drawn</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"] if notes else []
    index = folder / "index.html"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(HEAD + "\n".join([*parts, "</body>", "</html>"]) + "\n", encoding="utf-8")
    return index


def _id(file: Path) -> str:
    return escape(file.stem, quote=True)


def _figure(file: Path, title: str) -> str:
    text, name = escape(" ".join(title.split()), quote=True), escape(file.name, quote=True)
    image = f'<a href="{name}"><img src="{name}" alt="{text}" loading="lazy"></a>'
    return f'<figure id="{_id(file)}">{image}<figcaption>{name}</figcaption></figure>'
