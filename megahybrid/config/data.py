"""`DataConfig`: which token files are read, and how documents and blocks are served."""

from typing import Annotated, Literal

from pydantic import Field

from megahybrid.config import limits
from megahybrid.config.base import Frozen, Name


class Source(Frozen):
    """One prepared dataset."""

    path: str = Field(
        description="folder with manifest.json, a plan made by `data pack`, or a foreign .bin file"
    )


class DataConfig(Frozen):
    """The data that is trained on, and the order in which it is served: lanes of long blocks."""

    sources: Annotated[dict[Name, Source], limits.SOURCES] = Field(
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
        parts = (("sources", self.sources), ("held_out", self.held_out))
        return [
            (f"data.{part}.{name}", source.path)
            for part, sources in parts
            for name, source in sources.items()
        ]
