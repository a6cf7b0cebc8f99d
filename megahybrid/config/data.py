"""`DataConfig`: which token files are read, and how documents and blocks are served."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megahybrid.config import limits
from megahybrid.config.base import Frozen, Name
from megahybrid.config.stages import Length
from megahybrid.printable import shortened


class Source(Frozen):
    """One prepared dataset that is scored."""

    path: str = Field(
        description="folder with manifest.json, a plan made by `data pack`, or a foreign .bin file"
    )


class TrainingSource(Frozen):
    """Data to train on: one dataset or plan for every length, or a plan of one dataset for each."""

    path: str | None = Field(
        default=None,
        description="folder with manifest.json, a plan made by `data pack`, or a foreign .bin file",
    )
    plans: Annotated[dict[Length, str], limits.LENGTHS] = Field(
        default={},
        description="in its place: for each length a plan of the same dataset, packed for it; each "
        "has a cursor of its own",
    )

    @model_validator(mode="after")
    def _check_one_of_both(self) -> "TrainingSource":
        if self.path is None and not self.plans:
            raise ValueError("path is missing (or plans, one for each length). Give it a value.")
        if self.path is not None and self.plans:
            raise ValueError(
                f"path={shortened(self.path, 100)} and plans are both given. Keep path, for every "
                "length, or plans, one for each."
            )
        return self

    def fields(self) -> Iterator[tuple[str, str]]:
        """Yield each field that names a path, from here, and the path."""
        if self.path is not None:
            yield "path", self.path
        for length, path in self.plans.items():
            yield f"plans.{length}", path

    def moved(self, paths: Mapping[str, str]) -> "TrainingSource":
        """The same source with other paths, by the fields that name them."""
        return self.model_copy(
            update={
                "path": paths.get("path"),
                "plans": {length: paths[f"plans.{length}"] for length in self.plans},
            }
        )


class DataConfig(Frozen):
    """The data that is trained on, and the order in which it is served: lanes of long blocks."""

    sources: Annotated[dict[Name, TrainingSource], limits.SOURCES] = Field(
        min_length=1, description="training data by name"
    )
    held_out: Annotated[dict[Name, Source], limits.SOURCES] = Field(
        default={}, description="validation data by name"
    )
    documents: Literal["masked", "joined"] = Field(
        default="masked",
        description="masked: a token sees its own document only; joined: its whole row so far",
    )
    block_tokens: Annotated[int, limits.BATCH_TOKENS] = Field(
        gt=0,
        description="tokens of the contiguous blocks that are permuted; at least the longest "
        "length",
    )
    lanes: Annotated[int, limits.LANES] = Field(
        default=64, gt=0, description="blocks of a source that are read at a time"
    )
    exhausted: Literal["repeat", "stop", "renormalise"] = Field(
        default="repeat",
        description="when a source was served once. repeat: again in another order; stop: the run "
        "ends; renormalise: the others share its part",
    )
    tokenizer: str | None = Field(
        default=None, description="tokenizer file, checked against the data and used for samples"
    )

    def datasets(self) -> list[tuple[str, str]]:
        """Return the field and the path of every dataset that is named, sources first."""
        sources = [
            (f"data.sources.{name}.{field}", path)
            for name, source in self.sources.items()
            for field, path in source.fields()
        ]
        held_out = [
            (f"data.held_out.{name}.path", source.path) for name, source in self.held_out.items()
        ]
        return sources + held_out
