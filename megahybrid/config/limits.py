"""How large a value that somebody writes may be, and why: what is checked here is walked through or
allocated later, and a slip of the keyboard must not cost an hour."""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

BEYOND = "beyond_limit"  # the type of the error, for `explain`


@dataclass(frozen=True)
class AtMost:
    """The largest number, or the most entries of a list or a mapping, that a field takes."""

    limit: int
    why: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict | tuple):
            if len(value) > self.limit:
                raise PydanticCustomError(
                    BEYOND,
                    "has {count} entries, more than {limit} ({why})",
                    {"count": f"{len(value):,}", "limit": f"{self.limit:,}", "why": self.why},
                )
        elif value is not None and value > self.limit:
            raise PydanticCustomError(
                BEYOND,
                "is more than {limit} ({why})",
                {"limit": f"{self.limit:,}", "why": self.why},
            )
        return value


_INT32 = 2**31 - 1

# The network. The largest that are known have 126 layers, 128 heads of 576, a width of 18,432 and a
# vocabulary of 262,144.
LAYERS = AtMost(10_000, "each layer is listed and counted")
SCHEMES = AtMost(1_000, "each is checked with every stage that changes it")
HEADS = AtMost(2**16, "every degree that divides them is tried")
HEAD_DIM = AtMost(2**16, "each has a table of rotations")
WIDTH = AtMost(2**24, "one matrix of that width fills a device")
CONTEXT = AtMost(2**16, "every degree that divides it is tried")
VOCABULARY = AtMost(_INT32, "token files hold ids of 32 bits")
LENGTH = AtMost(_INT32, "kernels count positions in 32 bits")

# The stages and the data.
STAGES = AtMost(200, "each is checked with all before it")
TOKENS = AtMost(10**18, "tokens are counted in 64 bits")
BATCH_TOKENS = AtMost(10**12, "no step takes as many tokens")
MICRO_BATCH_TOKENS = AtMost(_INT32, "kernels count the tokens of a pass in 32 bits")
LENGTHS = AtMost(100, "each step weighs all of them")
RATIO = AtMost(10**6, "their order repeats after as many steps")
RAMP_LEVELS = 10_000
SOURCES = AtMost(1_000, "each is a dataset that stays open")
LANES = AtMost(10**6, "checkpoints hold a cursor for each")
BUDGET_LAYERS = 1_000

# Suites and studies.
CONTEXTS = AtMost(20, "each costs as much as three losses")
TASKS = AtMost(1_000, "each is asked one after the other")
TRIALS = AtMost(10**6, "each is a question that is drawn and answered")
NEEDLES = AtMost(10**5, "each is a sentence that is drawn")
QUESTIONS = 10**6
VARIANTS = AtMost(1_000, "each run file is checked before the first run")
RUNS = 10_000
ROWS = AtMost(10**9, "each is drawn and written")

# Sites.
NODES = 100_000
RANKS = AtMost(4_096, "each rank of a node is a process")
CPUS = AtMost(2**16, "no node has as many")
