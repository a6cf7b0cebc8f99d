"""What `sample` writes, a class of transformers writes too: 200 tokens, both by their caches."""

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from megahybrid.config.model import ModelConfig
from megahybrid.evaluate.sampling import sample_tokens
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.table import ARCHITECTURES
from megahybrid.interop.logit_proof import BOUND
from megahybrid.interop.shards import reordered
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import model_of
from tests.interop.test_generation import CASES
from tests.plain_model import random_tensors

PROMPT, NEW = 12, 200  # windows and chunks of the cases hold 9 tokens at most


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Shapes are checked wherever the same functions are tested; here they would cost the most."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def built(architecture: Architecture, model: ModelConfig, tensors: dict[str, torch.Tensor]) -> Any:
    """The class of transformers with a model's weights, without the files of an export."""
    import transformers

    fields = architecture.to_config(model, model.layer_plan, PROMPT + NEW)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if architecture.code_files:
        from megahybrid.interop.remote_code.configuration_megahybrid import MegahybridConfig
        from megahybrid.interop.remote_code.modeling_megahybrid import MegahybridForCausalLM

        theirs: Any = MegahybridForCausalLM(MegahybridConfig(**fields))
    else:
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {}
    for name in architecture.tensor_names(model, model.layer_plan):
        constant = torch.full(name.shape, name.constant)
        held = constant if name.ours is None else tensors[name.ours]
        weights[name.theirs] = torch.from_numpy(reordered(held.numpy(), name, model.head_dim))
    named = {key: weights[architecture.file_name(key)] for key in theirs.state_dict()}
    theirs.load_state_dict(named)
    return theirs.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
@torch.no_grad()
def test_two_hundred_tokens_are_those_of_sample(architecture: Architecture) -> None:
    """A class without a case in CASES fails here by its name."""
    name, schemes, fields = CASES[architecture.name]
    assert name == architecture.name
    different = [scheme for i, scheme in enumerate(schemes) if scheme not in schemes[:i]]
    # An embedding that is the head as well writes the last token again and again.
    model = model_of(different, **fields | {"tie_embeddings": False})
    tensors = random_tensors(model, 3, dtype=torch.float32, std=0.3)
    ours = Transformer(model, ParallelMesh.single("cpu")).eval()
    ours.load_canonical(tensors)
    prompt = torch.randint(61, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    written = sample_tokens(
        ours,
        prompt[0].tolist(),
        tokens=NEW,
        temperature=0,
        seed=1,
        context_tokens=PROMPT + NEW,
        vocab_size=model.vocab_size,
        eod_id=-1,  # none: random weights end no text
    )
    theirs = built(architecture, model, tensors)
    found = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert found[0, PROMPT:].tolist() == written
    assert len(set(written)) > 10
    # No token was a matter of rounding: both may be off by BOUND times the largest logit.
    logits = ours.logits(found[:, :-1])[0, PROMPT - 1 :]
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 2 * BOUND * logits.abs().max()
