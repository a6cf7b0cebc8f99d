"""Text that an export generates, with its cache of keys and values, is the text our model does."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megahybrid.config.model import ModelConfig
from megahybrid.errors import InteropError
from megahybrid.interop import export as exporting
from megahybrid.interop.generation import cache_name
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.interop.examples import (
    HEAD,
    LOCAL,
    NOPE,
    PARALLEL,
    PER_HEAD,
    ROPE,
    WHOLE,
    checkpoint_of_model,
    model_of,
)
from tests.interop.test_export import exported, loaded, rope
from tests.plain_model import PlainModel

NEW = 24
BIASED = {"bias": "qkv"}
GATED = {"gate": "element"}
WEIGHTLESS = {"qk_norm": {"kind": "rms", "weight": "none"}}
TEMPERED = NOPE | {"score_scale": {"kind": "llama4", "floor": 4, "coefficient": 0.3}}
TEMPERED_ROPE = {
    "position": {
        "kind": "rope",
        "theta": 1e4,
        "scaling": {"kind": "llama3", "factor": 8.0, "original_length": 4},
    },
    "score_scale": {"kind": "llama4", "floor": 4, "coefficient": 0.3, "offset": 0},
}
SINK = {"sink": True}
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "Cohere2": ("Cohere2", [LOCAL, LOCAL, LOCAL, NOPE], PARALLEL),
    "SmolLM3": ("SmolLM3", [LOCAL, LOCAL, LOCAL, NOPE], {}),
    "Cohere": ("Cohere", [ROPE | PER_HEAD] * 2, PARALLEL),
    "Llama": ("Llama", [ROPE] * 2, {}),
    "Mistral": ("Mistral", [LOCAL] * 2, {}),
    "Qwen2": ("Qwen2", [LOCAL | BIASED, ROPE | BIASED], {}),
    "Qwen3": ("Qwen3", [LOCAL | HEAD, ROPE | HEAD], {}),
    "CohereCompass": ("CohereCompass", [LOCAL, LOCAL, NOPE], PARALLEL),
    "ExaoneMoe": ("ExaoneMoe", [LOCAL | HEAD, LOCAL | HEAD, NOPE | HEAD], {}),
    "Mellum": ("Mellum", [LOCAL | HEAD, NOPE | HEAD], {}),
    "Exaone4": ("Exaone4", [LOCAL | HEAD, NOPE | HEAD], {"block": "post_norm"}),
    "Olmo2": ("Olmo2", [ROPE | WHOLE] * 2, {"block": "post_norm"}),
    "Olmo3": ("Olmo3", [LOCAL | WHOLE, NOPE | WHOLE], {"block": "post_norm"}),
    "Afmoe": ("Afmoe", [GATED | LOCAL | HEAD, GATED | NOPE | HEAD], {"block": "sandwich"}),
    "Gemma3": (
        "Gemma3",
        [LOCAL | HEAD, rope(1e6, {"kind": "linear", "factor": 8.0}) | HEAD],
        {
            "block": "sandwich",
            "activation": "gelu_tanh",
            "embedding_scale": 32**0.5,
            "logit_softcap": 8.0,
        },
    ),
    "Llama4": (
        "Llama4",
        [ROPE | {"chunk": 5} | WEIGHTLESS, ROPE | {"chunk": 5} | WEIGHTLESS, TEMPERED],
        {},
    ),
    "Ministral3": ("Ministral3", [TEMPERED_ROPE | {"window": 5}] * 2, {}),
    "GraniteSWA": ("GraniteSWA", [LOCAL, NOPE], {"logit_scale": 0.5}),
    "GraniteSWA, sinks": (
        "GraniteSWA",
        [one | SINK | {"score_scale": {"kind": "fixed", "scale": 0.3}} for one in (LOCAL, NOPE)],
        {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 0.25},
    ),
    "Flint": ("Flint", [LOCAL | HEAD | SINK, NOPE | HEAD | SINK], {}),
    "Megahybrid": (
        "Megahybrid",
        [
            LOCAL | HEAD,
            ROPE | HEAD | {"window": 9},
            NOPE | HEAD | {"score_scale": {"kind": "log", "base": 3.0}},
            NOPE | HEAD | {"score_scale": {"kind": "llama4", "floor": 4, "coefficient": 0.3}},
            LOCAL | {"gate": "head", "bias": "qkv", "sink": True},
            ROPE | WEIGHTLESS | {"chunk": 5},
        ],
        {"tie_embeddings": False},
    ),
    "two-views": (
        "Megahybrid",
        [
            NOPE | {"near": LOCAL, "fuse": {"gate": "token"}},
            ROPE | HEAD | {"window": 9, "near": LOCAL, "fuse": {"gate": "head"}},
            NOPE | {"near": LOCAL, "split": {"near": 1, "of": 2}, "gate": "head"},
        ],
        {},
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
@pytest.mark.parametrize(
    ("case", "keys"), [("Megahybrid", [4, 8, 40, 40, 4, 4]), ("two-views", [40, 8, 40])]
)
def test_the_cache_of_a_layer_is_bounded_by_its_window(
    case: str, keys: list[int], tmp_path: Path
) -> None:
    """Of one with two views by the far one's: keys are held once."""
    _, schemes, fields = CASES[case]
    model = model_of(schemes, **fields)
    theirs, tensors = exported(tmp_path, model)
    tokens = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(4))
    wanted = PlainModel(model, tensors).logits(tokens)
    cache, found = None, []
    for start, stop in ((0, 3), (3, 14), (14, 15), (15, 30), (30, 40)):  # chunks over the windows
        out = theirs(input_ids=tokens[:, start:stop], use_cache=True, **{cache_name(): cache})
        cache = out[cache_name()]
        found.append(out.logits)
    assert (torch.cat(found, dim=1) - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == keys


@torch.no_grad()
@pytest.mark.parametrize("case", ["Megahybrid", "two-views"])
def test_padding_on_the_left_changes_nothing(case: str, tmp_path: Path) -> None:
    _, schemes, fields = CASES[case]
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
    attention = type(theirs).__module__.replace(".modeling_", ".attention_")
    monkeypatch.setattr(sys.modules[attention], "QUERY_BLOCK", 7)
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


@torch.no_grad()
def test_both_names_of_the_cache_are_known_and_no_other_one_is_ignored(tmp_path: Path) -> None:
    from transformers import DynamicCache

    theirs, _ = exported(tmp_path, model_of([LOCAL, ROPE | {"window": 9}]))
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(4))
    wanted = theirs(input_ids=tokens, use_cache=False).logits[:, -1:]

    def filled() -> DynamicCache:
        return theirs(input_ids=tokens[:, :-1], use_cache=True)[cache_name()]

    last = {"input_ids": tokens[:, -1:]}
    for module in (theirs, theirs.model):
        for name in ("cache", "past_key_values"):
            found = module(**last, **{name: filled()})[0]
            found = theirs.lm_head(found) if module is theirs.model else found
            assert (found - wanted).abs().max() <= 1e-5
        for name, value in (
            ("kv_store", filled()),  # whatever a later version calls it
            ("states", {"decoder": [filled()]}),
            ("cache_params", torch.zeros(1)),
            ("past", ((torch.zeros(1), torch.zeros(1)),)),
        ):
            with pytest.raises(TypeError, match=f"does not know {name}, which carries a cache"):
                module(**last, **{name: value})
        with pytest.raises(ValueError, match="two names of one argument"):
            module(**last, cache=filled(), past_key_values=filled())
        with pytest.raises(ValueError, match="has 12 entries, but there are 0 tokens in the cache"):
            module(**last, attention_mask=torch.ones(1, 12))
        module(**last, cache_position=torch.tensor([0]), num_logits_to_keep=None, past=None)


@pytest.mark.parametrize("name", ["SmolLM3", "Megahybrid"])
def test_an_export_whose_generate_loses_the_cache_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.24 lost it: forward knew the cache by another name than `generate`."""
    from transformers import GenerationMixin

    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    right = GenerationMixin.prepare_inputs_for_generation

    def forgetful(*given: Any, **named: Any) -> dict[str, Any]:
        inputs = right(*given, **named)
        inputs.pop(cache_name(), None)
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", forgetful)
    with pytest.raises(InteropError, match="logits differ by .* tokens, generated"):
        exporting.export(tmp_path / "run", tmp_path / "out", tokenizer="none", architecture=name)
    assert not (tmp_path / "out").exists()


def test_code_that_swallows_its_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, ROPE | {"window": 9}]))
    right = exporting._config_files

    def wrong(*given: Any) -> dict[str, str]:
        files = right(*given)
        text = files["modeling_megahybrid.py"]
        swallowed = text.replace(
            "cache = given_cache(cache, past_key_values, kwargs)", "cache = None"
        ).replace("check_mask(mask, seen, seq)", "mask = mask[:, : seen + seq]")
        assert swallowed != text
        return files | {"modeling_megahybrid.py": swallowed}

    monkeypatch.setattr(exporting, "_config_files", wrong)
    with pytest.raises(InteropError, match="logits differ by .* cached"):
        exporting.export(tmp_path / "run", tmp_path / "out", tokenizer="none")


def test_a_generate_that_does_not_take_the_largest_logit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SmolLM3ForCausalLM

    checkpoint_of_model(tmp_path / "run", model_of([LOCAL, NOPE]))
    right = SmolLM3ForCausalLM.generate

    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        return right(self, *given, **named, suppress_tokens=list(range(40)))

    monkeypatch.setattr(SmolLM3ForCausalLM, "generate", wrong)
    with pytest.raises(InteropError, match="does not take the token of the largest logit"):
        exporting.export(tmp_path / "run", tmp_path / "out", tokenizer="none")


@torch.no_grad()
def test_our_own_class_drafts_and_is_drafted_for(tmp_path: Path) -> None:
    """Both take tokens back that a window had already forgotten."""
    theirs, _ = exported(tmp_path, model_of([LOCAL, ROPE | {"window": 9}]))
    (tmp_path / "small").mkdir()
    draft, _ = exported(tmp_path / "small", model_of([LOCAL | {"window": 3}]))
    prompt = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(4))
    plain = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=False)
    found = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, assistant_model=draft)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_loaded_and_run_warns_of_what_goes_away(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name, schemes, fields = CASES[case]
    checkpoint_of_model(tmp_path / "run", model_of(schemes, **fields))
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exporting.export(
                tmp_path / "run", tmp_path / "out", tokenizer="none", architecture=name
            )
            theirs = AutoModelForCausalLM.from_pretrained(
                str(tmp_path / "out"), trust_remote_code=True
            )
            theirs.generate(torch.tensor([[3, 4, 5, 6, 7, 8, 9]]), max_new_tokens=9)
            theirs.save_pretrained(tmp_path / "again")
    finally:
        logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
