"""A scheme that is known and not served is refused in one line, with the reason."""

import pytest

from megahybrid.config import check_run
from megahybrid.config.refused import REASONS
from megahybrid.errors import ConfigError
from tests.config.example import example

LOCAL = "model.layer_plan.schemes.local"


def refusal(override: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_run(example(override))
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize("name", REASONS)
def test_its_name_as_a_kind_is_answered_with_the_reason(name: str) -> None:
    assert refusal(f"{LOCAL}.position={{kind: {name}}}") == (
        f"{LOCAL}.position.kind={name} is not supported: {REASONS[name]}. Use rope or nope."
    )


@pytest.mark.parametrize(
    ("override", "begin", "end"),
    [
        (f"{LOCAL}.position.kind=M-RoPE", f"{LOCAL}.position.kind=M-RoPE", "Use rope or nope."),
        (
            f"{LOCAL}.position.scaling={{kind: dynamic, factor: 2}}",
            f"{LOCAL}.position.scaling.kind=dynamic",
            "Use linear or ntk or yarn or llama3 or longrope.",
        ),
        (f"{LOCAL}.score_scale={{kind: soft_cap}}", f"{LOCAL}.score_scale.kind=soft_cap", "ssmax."),
        (f"{LOCAL}.qk_norm.kind=softcap", f"{LOCAL}.qk_norm.kind=softcap", "layernorm."),
        (f"{LOCAL}.gate=router", f"{LOCAL}.gate=router", "Use none or head or element."),
        (f"{LOCAL}.alibi=true", f"{LOCAL}.alibi", "Remove it."),
        (
            "stages.1.schemes={local: {position: {kind: alibi}}}",
            "stages.1.schemes.local.position.kind=alibi",
            "Use rope or nope.",
        ),
    ],
)
def test_it_is_refused_wherever_a_scheme_has_a_word(override: str, begin: str, end: str) -> None:
    line = refusal(override)
    assert line.startswith(f"{begin} is not supported: ") and line.endswith(end)


def test_elsewhere_these_are_words_like_others() -> None:
    assert refusal("log.wandb=fire") == "log.wandb=fire is not one of off, offline, online."
    assert refusal("data.path=here").startswith("data.path is not a field.")
