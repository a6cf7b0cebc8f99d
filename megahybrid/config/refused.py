"""Attention schemes that are known and not served, by the names that people write, and why."""

from collections.abc import Iterable

PAIR_BIAS = (
    "a bias of query and key together has no windowed, varlen or cuDNN kernel, and no released "
    "model has it beside layers without position"
)
KEY_BIAS = "a bias of the key alone is not built; it would fit the flex kernel"
DATA_MASK = "which keys a query sees would depend on the data, for which no kernel here has a mask"
SOFT_CAP = "a soft-cap on scores has been superseded by QK-norm (qk_norm)"
ROUTER = "a hard choice for each token has no gradient"
DYNAMIC = (
    "its frequencies change with the length seen so far, so training and a cache disagree; ntk has "
    "fixed ones"
)
SINK_TOKENS = (
    "tokens that every query sees need a mask of their own; learned sinks (sink: true) and a gate "
    "(gate: head, arXiv 2505.06708) do what they are for"
)
SEVERAL_AXES = "positions of several axes are for images and video, and a text has one"
# Names without case, dashes and underscores.
REASONS = {
    **dict.fromkeys(
        ("t5", "t5bias", "t5relative", "relativebias", "fire", "kerple", "cope"), PAIR_BIAS
    ),
    **dict.fromkeys(("path", "pathattention"), PAIR_BIAS),
    **dict.fromkeys(("alibi", "alibibias", "fox", "forgetting", "forgetgate"), KEY_BIAS),
    **dict.fromkeys(("softcap", "softcapping", "attnlogitsoftcapping"), SOFT_CAP),
    **dict.fromkeys(("scoresoftcap", "attentionsoftcap", "attnsoftcap"), SOFT_CAP),
    **dict.fromkeys(("dsa", "nsa", "sparse", "sparseattention"), DATA_MASK),
    **dict.fromkeys(("router", "hardrouter", "routing"), ROUTER),
    **dict.fromkeys(("dynamic", "dynamicntk", "ntkdynamic"), DYNAMIC),
    **dict.fromkeys(("streamingllm", "sinktokens", "numsinktokens"), SINK_TOKENS),
    **dict.fromkeys(("attentionsink", "attentionsinks"), SINK_TOKENS),
    **dict.fromkeys(("mrope", "mropesection"), SEVERAL_AXES),
}
# Where such a name is a scheme's: wandb and datasets have names of their own.
OF_A_SCHEME = ("schemes", "position", "scaling", "score_scale", "qk_norm", "gate")


def reason(parts: Iterable[str], name: object) -> str | None:
    """Why `name`, written at the dotted path `parts` within a scheme, is not served; None where
    it is none of these names or stands elsewhere."""
    if not any(part in OF_A_SCHEME for part in parts):
        return None
    plain = "".join(letter for letter in str(name)[:40].lower() if letter.isalnum())
    return REASONS.get(plain)
