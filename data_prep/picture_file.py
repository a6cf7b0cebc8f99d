"""Pictures that commands draw: .svg files, and no other kind."""

from pathlib import Path

from megahybrid.errors import DataError


def check_picture(name: str | None) -> None:
    """Raises DataError where a picture could not be written as it was asked for."""
    if name is None:
        return
    path = Path(name)
    if path.suffix.lower() != ".svg":
        raise DataError(
            f"--picture={name} is no .svg, the one kind of picture that is drawn. Name a file "
            "that ends in .svg."
        )
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise DataError(f"--picture={name} {wrong}. Name a file in a folder that is there.")
    if path.exists() and not path.is_file():
        raise DataError(f"--picture={name} is no plain file. Name another.")
