"""Compiled layers on context ranks are the layers as written: the exchange lies between regions."""

from megahybrid.config.parallel import ParallelConfig
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from tests import distributed
from tests.model.test_compiled import TRACED, fresh_compiler, step
from tests.parity.cases import model
from tests.plain_model import random_tensors, relative_error
from tests.plain_training import random_batch

LENGTH = 48
FAMILY = "llama4-log"  # a temperature of each position, a rotation, a window
EXCHANGE = {"full": "keys", "layout": "zigzag"}


def compiled_errors(ranks: distributed.Ranks) -> dict[str, float]:
    mesh, config = ranks.mesh(1, 2), model(FAMILY, "parallel")
    parallel = ParallelConfig.model_validate({"context": 2, "exchange": EXCHANGE})
    context = ContextRanks(mesh, config, parallel)
    built = Transformer(config, mesh, recompute=("selective", "full"), context=context).double()
    built.load_canonical(random_tensors(config, 1))
    batch = random_batch(config.vocab_size, 2, LENGTH, seed=1)
    with fresh_compiler():
        plain = step(built, batch)
        built.compile_blocks(TRACED)
        compiled = step(built, batch)
    return {name: relative_error(compiled[name], plain[name]) for name in plain}


def test_a_step_through_compiled_regions_is_the_step_as_written() -> None:
    for errors in distributed.run(2, compiled_errors, timeout_seconds=240):
        assert len(errors) > 10
        assert max(errors.values()) < 1e-10, errors
