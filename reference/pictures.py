"""The kinds of files that pictures are written as; the layer and the simulator draw different ones by the same rule."""

from pathlib import Path

PICTURE_FORMATS = ("png", "pdf", "svg")


def picture_format(file: Path | str) -> str:
    """One of `PICTURE_FORMATS` by the file's suffix; PNG where it has none.

    Raises:
        ValueError: another suffix: the file would not be what its name says.
    """
    suffix = _suffix(file)
    if suffix is None:
        return PICTURE_FORMATS[0]
    if suffix not in PICTURE_FORMATS:
        endings = ", ".join(f".{name}" for name in PICTURE_FORMATS)
        raise ValueError(f"a picture must end in one of {endings}, got '{file}'")
    return suffix


def named_as_picture(path: Path | str) -> bool:
    """Whether it has the suffix of a picture."""
    return _suffix(path) in PICTURE_FORMATS


def _suffix(file: Path | str) -> str | None:
    _, dot, ending = Path(file).name.rpartition(".")  # also of a name that is nothing else, such as ".pdf"
    return ending.lower() if dot else None
