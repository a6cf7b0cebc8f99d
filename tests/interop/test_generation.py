"""Text that an export generates, with its cache of keys and values, is the text our model does."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.config.model import ModelConfig
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import HEAD, LOCAL, NOPE, PARALLEL, ROPE, WHOLE, model_of
from tests.interop.test_export import exported, loaded
from tests.plain_model import PlainModel

NEW = 24
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "Cohere2": ("Cohere2", [LOCAL, LOCAL, LOCAL, NOPE], PARALLEL),
    "SmolLM3": ("SmolLM3", [LOCAL, LOCAL, LOCAL, NOPE], {}),
    "Exaone4": ("Exaone4", [LOCAL | HEAD, NOPE | HEAD], {"block": "post_norm"}),
    "Olmo3": ("Olmo3", [LOCAL | WHOLE, NOPE | WHOLE], {"block": "post_norm"}),
    "GraniteSWA": ("GraniteSWA", [LOCAL, NOPE], {"logit_scale": 0.5}),
    "Megahybrid": (
        "Megahybrid",
        [
            LOCAL | HEAD,
            ROPE | HEAD | {"window": 9},
            NOPE | HEAD | {"logit_scale": {"kind": "log", "base": 3.0}},
            NOPE | HEAD | {"logit_scale": {"kind": "llama4", "floor": 4, "coefficient": 0.3}},
        ],
        {"tie_embeddings": False},
    ),
}


@torch.no_grad()
def our_tokens(model: ModelConfig, tensors: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Greedy tokens of our model, everything computed anew for each."""
    ours = Transformer(model, ParallelMesh.single("cpu")).eval()
    ours.load_canonical(tensors)
    tokens = prompt
    for _ in range(NEW):
        tokens = torch.cat((tokens, ours.logits(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("case", CASES)
def test_generation_is_ours_token_for_token_past_the_window(case: str, tmp_path: Path) -> None:
    name, schemes, fields = CASES[case]
    model = model_of(schemes, **fields)
    theirs, tensors = exported(tmp_path, model, architecture=name)
    generator = torch.Generator().manual_seed(2)
    for length in (1, 4, 5, 12):
        prompt = torch.randint(61, (2, length), generator=generator)
        found = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False)[:, length:]
        assert torch.equal(found, our_tokens(model, tensors, prompt))


@torch.no_grad()
def test_the_cache_of_a_windowed_layer_is_bounded_by_its_window(tmp_path: Path) -> None:
    _, schemes, fields = CASES["Megahybrid"]
    model = model_of(schemes, **fields)
    theirs, tensors = exported(tmp_path, model)
    tokens = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(4))
    wanted = PlainModel(model, tensors).logits(tokens)
    cache, found = None, []
    for start, stop in ((0, 3), (3, 14), (14, 15), (15, 30), (30, 40)):  # chunks over the windows
        out = theirs(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    assert (torch.cat(found, dim=1) - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == [4, 8, 40, 40]


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    _, schemes, fields = CASES["Megahybrid"]
    theirs, _ = exported(tmp_path, model_of(schemes, **fields))
    generator = torch.Generator().manual_seed(4)
    short, long = (torch.randint(61, (1, n), generator=generator) for n in (4, 11))
    together = torch.cat((torch.cat((torch.zeros(1, 7, dtype=torch.long), short), 1), long))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :7] = 0
    both = theirs.generate(together, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, prompt in enumerate((short, long)):
        alone = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(both[row, 11:], alone[0, prompt.shape[1] :])


@torch.no_grad()
def test_beams_and_guessed_tokens_go_through_the_cache(tmp_path: Path) -> None:
    """Both reorder or take back what the windows have kept; without a cache there is nothing to."""
    _, schemes, fields = CASES["Megahybrid"]
    theirs, _ = exported(tmp_path, model_of(schemes, **fields))
    prompt = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": NEW, "do_sample": False}
    for more, plain in (
        ({"num_beams": 3}, {"num_beams": 3}),
        ({"prompt_lookup_num_tokens": 3}, {}),
    ):
        found = theirs.generate(prompt, **options, **more)
        assert torch.equal(found, theirs.generate(prompt, **options, **plain, use_cache=False))


@torch.no_grad()
def test_hidden_states_are_given_and_attention_weights_refused(tmp_path: Path) -> None:
    theirs, _ = exported(tmp_path, model_of([LOCAL, ROPE | {"window": 9}]))
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(4))
    logits, states = theirs(input_ids=tokens, output_hidden_states=True, use_cache=False).to_tuple()
    assert len(states) == 3 and torch.equal(states[0], theirs.model.embed_tokens(tokens))
    assert torch.equal(theirs.lm_head(states[-1]) * theirs.config.logit_scale, logits)
    assert torch.equal(theirs(input_ids=tokens, return_dict=False)[0], logits)
    with pytest.raises(ValueError, match="keeps no weights"):
        theirs(input_ids=tokens, output_attentions=True)


@torch.no_grad()
def test_long_prompts_are_attended_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, schemes, fields = CASES["Megahybrid"]
    theirs, _ = exported(tmp_path, model_of(schemes, **fields))
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(4))
    whole = theirs(input_ids=tokens).logits
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "QUERY_BLOCK", 7)
    assert (theirs(input_ids=tokens).logits - whole).abs().max() <= 1e-5


def test_the_loss_is_transformers_own(tmp_path: Path) -> None:
    theirs, _ = exported(tmp_path, model_of([LOCAL, ROPE | {"window": 9}]))
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(4))
    out = theirs(input_ids=tokens, labels=tokens)
    wanted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_our_own_class_is_saved_with_its_code_and_loaded_again(tmp_path: Path) -> None:
    theirs, _ = exported(tmp_path, model_of([LOCAL, ROPE | {"window": 9}]))
    theirs.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(4))
    assert torch.equal(again(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
