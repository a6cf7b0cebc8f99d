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
    if not path.parent.is_dir():
        raise DataError(
            f"--picture={name} lies in {path.parent}, which is no folder. Name a file in one that "
            "is there."
        )
