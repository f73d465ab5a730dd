"""Names of machines: of presets, "2x8xH100", and of files, "2xmy.toml"."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "presets"
_NAME = re.compile(r"(?:(?:(\d{1,6})x)?(\d{1,6})x)?([a-z0-9]+)", re.IGNORECASE | re.ASCII)
_NODES_OF_FILE = re.compile(r"(\d{1,6})x(?:(\d{1,6})x)?(.+)", re.IGNORECASE | re.ASCII)
GOOD_NAMES = '"8xH100", "2x8xH100"'


def hardware_names() -> list[str]:
    """The GPU kinds that have a preset, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def gpu_kind(name: str) -> str:
    """ "H100" of "2x8xH100"."""
    return re.sub(r"^(\d+x)+", "", name) or name


def hardware_file(name: str) -> Path | None:
    """The file that a machine's name means, "my.toml" of "2xmy.toml"; None for a preset's name."""
    return parse_file_name(name)[2] if name.lower().endswith(".toml") else None


def parse_name(name: str) -> tuple[int, int | None, str]:
    """Nodes, GPUs per node (None: the kind's usual node) and kind of a name."""
    kinds = {kind.lower(): kind for kind in hardware_names()}
    match = _NAME.fullmatch(name.strip())
    if match is None or match[3].lower() not in kinds:
        known = f"a GPU kind ({', '.join(kinds.values())}), NxKIND, MxNxKIND or the path of a .toml file"
        raise ValueError(f"hardware must be {known}; got {name!r}; good names: {GOOD_NAMES}")
    return int(match[1] or 1), int(match[2]) if match[2] else None, kinds[match[3].lower()]


def parse_file_name(name: str) -> tuple[int | None, int | None, Path]:
    """Nodes and GPUs per node (None: as the file says) and the path of "2x4xmy.toml"; a file of that name is itself."""
    match = _NODES_OF_FILE.fullmatch(name)
    if match is None or Path(name).is_file():
        return None, None, Path(name)
    return int(match[1]), int(match[2]) if match[2] else None, Path(match[3])
