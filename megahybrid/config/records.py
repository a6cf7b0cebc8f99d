"""Numbers of files that a run writes and reads again: bounded, so that an edited one is refused
before anything is made of it."""

from typing import Annotated

from pydantic import Field

# As large as any count of bytes, tokens or elements can be on a machine.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# Until the year 9999: what a calendar can say.
UnixSeconds = Annotated[float, Field(ge=0, le=253402300799)]
