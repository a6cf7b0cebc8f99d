"""The arithmetic of `megahybrid init`: from a text, a size and a machine to the values of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megahybrid.commands.init_chats import Chats, ChatStage, chat_stage
from megahybrid.commands.init_machine import CORE_FLOPS, Machine
from megahybrid.commands.init_texts import Texts
from megahybrid.config.base import did_you_mean
from megahybrid.config.counting import flops_per_token, parameters
from megahybrid.config.memory_estimate import memory_per_rank
from megahybrid.config.model import ModelConfig, either
from megahybrid.config.packaged import known_names
from megahybrid.config.parsing import parse
from megahybrid.config.run import RunConfig
from megahybrid.config.stages import Recompute
from megahybrid.config.yaml_file import merge, read_tree
from megahybrid.errors import ConfigError

# Beyond it a second look at the same text teaches little (arXiv 2305.16264).
EPOCHS = 4
# Where more text and more parameters are worth the same (arXiv 2203.15556); no limit, a yardstick.
TOKENS_PER_PARAMETER = 20
LEAST_PER_PARAMETER = 1.0  # with less a larger model only learns the text by heart
# On a CPU: ten minutes for a first try, a night for whoever asks for more.
TRY_SECONDS, NIGHT_SECONDS = 600, 8 * 3600
LEAST_ROWS = 16
LEAST_WORDS = 200  # or signs, of scripts without spaces: fewer have not 512 pieces in them
STEPS = 500
SHARES = (0.6, 0.25, 0.15, 0.1, 0.1, 0.1)  # of the tokens, by length; the shortest teaches most
POLICIES: tuple[Recompute, ...] = ("none", "selective", "chunked", "full")


@dataclass(frozen=True)
class Size:
    """What goes with a size: rows of these lengths, a batch of so many tokens at most, a rate."""

    lengths: tuple[int, ...]
    batch_tokens: int
    learning_rate: float


SIZES = {
    "tiny": Size((256, 1024, 4096), 4096, 5e-3),
    "10m": Size((512, 2048, 8192), 16_384, 2e-3),
    "150m": Size((2048, 8192, 32_768), 524_288, 1e-3),
    "1b": Size((4096, 16_384, 65_536), 2**20, 6e-4),
    "8b": Size((8192, 65_536), 2**22, 3e-4),
}
SCHEMES = Path("configs/models/schemes")


@dataclass(frozen=True)
class Recipe:
    """The values of a run, and the numbers that they came from."""

    size: str
    plan: str
    tree: dict[str, Any]
    run: RunConfig
    parameters: int
    text_tokens: int  # an estimate
    tokens: int  # of text to train on
    limited_by: str  # which of the bounds `tokens` met
    left_out: tuple[int, ...]  # lengths that no document reaches
    memory: tuple[int, ...]  # bytes of a rank, by stage
    chats: ChatStage | None = None  # the last stage, if there are conversations

    @property
    def lengths(self) -> list[int]:
        """The length of each stage."""
        return [next(iter(stage.lengths)) for stage in self.run.stages]


def read_lengths(text: str) -> tuple[int, ...]:
    """Return the lengths that "2k,8k,32k" says, k being 1,024. Raises ConfigError."""
    found = []
    for word in text.split(","):
        number, unit = word.strip().lower(), 1
        if number.endswith("k"):
            number, unit = number[:-1], 1024
        if not number.isdecimal() or not 16 <= int(number) * unit <= 2**24:
            raise ConfigError(
                f"--lengths={text[:60]} has '{word.strip()[:20]}', which is no length from 16 to "
                "16,777,216 tokens. Write them as 2k,8k,32k."
            )
        found.append(int(number) * unit)
    for shorter, longer in pairwise(found):
        if longer <= shorter or longer % shorter:
            raise ConfigError(
                f"--lengths={text[:60]} has {longer:,} after {shorter:,}: each is a multiple of "
                "the one before, so that no row of text is cut. Write them as 2k,8k,32k."
            )
    if len(found) > len(SHARES):
        raise ConfigError(
            f"--lengths={text[:60]} names {len(found)} lengths ({len(SHARES)} stages at most). "
            "Leave some out; the run file may have more."
        )
    return tuple(found)


def recipe(
    folder: str,
    target: Path,
    texts: Texts,
    machine: Machine,
    chats: Chats | None = None,
    *,
    size: str | None,
    plan: str,
    lengths: tuple[int, ...] | None,
) -> Recipe:
    """The run that fits a text and a machine. Raises ConfigError, one line, where none does."""
    if plan not in (known := known_names(SCHEMES)):
        hint = did_you_mean(plan, known)
        raise ConfigError(f"--plan={plan[:60]} is not one of {', '.join(known)}.{hint}")
    if size is not None and size not in SIZES:
        hint = did_you_mean(size, SIZES)
        raise ConfigError(f"--size={size[:60]} is not one of {', '.join(SIZES)}.{hint}")
    _refuse_repeated(folder, texts)
    tried = [size] if size else ["tiny"] if machine.device == "cpu" else list(reversed(SIZES))
    refused: ConfigError | None = None
    for name in tried:
        try:
            return _of_size(name, plan, folder, target, texts, machine, lengths, chats)
        except ConfigError as error:
            refused = error
    assert refused is not None
    raise refused


def _of_size(
    size: str,
    plan: str,
    folder: str,
    target: Path,
    texts: Texts,
    machine: Machine,
    lengths: tuple[int, ...] | None,
    chats: Chats | None,
) -> Recipe:
    vocab = vocabulary(size, texts)
    text_tokens = texts.tokens(vocab)
    used, left_out = _lengths(size, lengths, texts, vocab, folder)
    tree = {"model": _model(size, plan, vocab, used)}
    model = parse(ModelConfig, tree["model"], "model")
    count = parameters(model)
    tokens, limited_by = _tokens(size, model, count, text_tokens, used[0], machine)
    _refuse_too_little(size, folder, texts, count, text_tokens, used[0])
    refused: ConfigError | None = None
    for zero_stage in (1, 3) if machine.ranks > 1 else (1,):
        for policy in POLICIES:
            tree |= _rest(size, target, texts, machine, used, tokens, zero_stage, policy)
            stage = None
            if chats is not None:
                most = SIZES[size].batch_tokens
                stage = chat_stage(tree, chats, target, texts, machine, most)
            run = parse(RunConfig, tree)
            memory = _memory(run, machine)
            if max(memory) <= machine.room:
                learnt = run.stage_plan.total_tokens - (stage.tokens if stage else 0)
                told = (text_tokens, learnt, limited_by, left_out, memory, stage)
                return Recipe(size, plan, tree, run, count, *told)
            refused = _too_large(size, memory, run, machine)
    assert refused is not None
    raise refused


def _refuse_repeated(folder: str, texts: Texts) -> None:
    if texts.words < LEAST_WORDS and texts.signs < LEAST_WORDS:
        raise ConfigError(
            f"--data={folder[:200]} holds {texts.words:,} different words, too few for a "
            f"vocabulary ({LEAST_WORDS} at least). Add text that does not repeat itself."
        )


def vocabulary(size: str, texts: Texts) -> int:
    """A vocabulary that the text can fill: that of the size, less for few words, more where a
    script has more signs than that."""
    vocab = int(read_tree(Path(f"pkg:models/sizes/{size}.yaml"))["model"]["vocab_size"])
    while vocab > 512 and vocab > texts.words // 2 and vocab // 2 > texts.signs:
        vocab //= 2
    while vocab < 2 * texts.signs + 260:
        vocab *= 2
    return vocab


def _lengths(
    size: str, wanted: tuple[int, ...] | None, texts: Texts, vocab: int, folder: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of the stages, and those of the size that no document reaches."""
    longest = int(texts.longest / texts.characters_per_token(vocab))
    if wanted is None:
        known = SIZES[size].lengths
        reached = tuple(length for length in known if length <= longest) or known[:1]
        return reached, known[len(reached) :]
    if wanted[-1] > max(2 * longest, 64):
        raise ConfigError(
            f"--lengths={','.join(map(str, wanted))}: no document of {folder[:100]} is as long as "
            f"{wanted[-1]:,} tokens (the longest has some {longest:,}), and a row's documents do "
            f"not see one another. Use lengths up to {2 ** max(4, longest.bit_length()):,}, or "
            "longer documents."
        )
    return wanted, ()


def _model(size: str, plan: str, vocab: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The fields of a size and a plan, with a window that bites at the first length."""
    model = _packaged_model(size, plan)
    model["vocab_size"] = vocab
    for scheme in model["layer_plan"]["schemes"].values():
        if scheme.get("window"):
            scheme["window"] = min(scheme["window"], max(8, lengths[0] // 4))
    return model


def _packaged_model(size: str, plan: str) -> dict[str, Any]:
    """The model that megahybrid's own files of a size and of a plan say."""
    parts = (f"pkg:models/sizes/{size}.yaml", f"pkg:models/schemes/{plan}.yaml")
    found: dict[str, Any] = merge(*(read_tree(Path(part)) for part in parts))["model"]
    return found


def _tokens(
    size: str, model: ModelConfig, count: int, text_tokens: int, length: int, machine: Machine
) -> tuple[int, str]:
    """Tokens to train on: enough for the parameters, and no more than the text or a CPU gives."""
    bounds = {
        f"{TOKENS_PER_PARAMETER} a parameter, which is plenty": TOKENS_PER_PARAMETER * count,
        f"{EPOCHS} times the text, beyond which it wears out (arXiv 2305.16264)": EPOCHS
        * text_tokens,
    }
    if machine.device == "cpu":
        seconds, told = (
            (TRY_SECONDS, "10 minutes") if size == "tiny" else (NIGHT_SECONDS, "8 hours")
        )
        flops = seconds * machine.cores * CORE_FLOPS
        bounds[f"{told} on these cores"] = int(flops / flops_per_token(model, length))
    name = min(bounds, key=lambda name: bounds[name])
    return bounds[name], name


def _refuse_too_little(
    size: str, folder: str, texts: Texts, count: int, text_tokens: int, length: int
) -> None:
    names = list(SIZES)
    per_parameter = EPOCHS * text_tokens / count
    if size == names[0] or per_parameter >= LEAST_PER_PARAMETER:
        _refuse_few_rows(folder, text_tokens, length)
        return
    smaller = names[: names.index(size)]
    fitting = [name for name in smaller if name == names[0] or _is_enough(name, texts)]
    raise ConfigError(
        f"--size={size} has {count:,} parameters, and --data={folder[:100]} some {text_tokens:,} "
        f"tokens: {per_parameter:.2g} a parameter in {EPOCHS} epochs ({LEAST_PER_PARAMETER:g} at "
        f"least; {TOKENS_PER_PARAMETER} is much better). Use --size {either(fitting)}, or "
        "more text."
    )


def _is_enough(size: str, texts: Texts) -> bool:
    vocab = vocabulary(size, texts)
    model = _packaged_model(size, "rope") | {"vocab_size": vocab}
    count = parameters(parse(ModelConfig, model, "model"))
    return EPOCHS * texts.tokens(vocab) >= LEAST_PER_PARAMETER * count


def _refuse_few_rows(folder: str, text_tokens: int, length: int) -> None:
    if text_tokens < LEAST_ROWS * length:
        shorter = max(16, 2 ** (text_tokens // LEAST_ROWS).bit_length() // 2)
        raise ConfigError(
            f"--data={folder[:200]} holds some {text_tokens:,} tokens, fewer than {LEAST_ROWS} "
            f"rows of {length:,}. Add text, or use shorter rows: --lengths {shorter}."
        )


def _rest(
    size: str,
    target: Path,
    texts: Texts,
    machine: Machine,
    lengths: Sequence[int],
    tokens: int,
    zero_stage: int,
    policy: Recompute,
) -> dict[str, Any]:
    """Everything of a run but its model."""
    known = SIZES[size]
    shares = SHARES[: len(lengths)]
    rates = [float(f"{known.learning_rate * f:.3g}") for f in _falling(len(lengths))]
    stages: list[dict[str, Any]] = []
    for index, (length, share) in enumerate(zip(lengths, shares, strict=True)):
        wanted = min(known.batch_tokens, 2 ** (tokens // STEPS).bit_length() // 2)
        micro = length * max(1, min(_most_rows(size, length), wanted // machine.ranks // length))
        batch = micro * machine.ranks * max(1, wanted // (micro * machine.ranks))
        steps = max(1, round(tokens * share / sum(shares) / batch))
        rate = {"kind": "linear", "start": rates[index], "end": rates[index + 1]}
        if index == 0:
            rate["warmup_tokens"] = batch * max(0, min(steps // 10, 2000))
        stages.append(
            {
                "name": f"rows_of_{length}",
                "tokens": steps * batch,
                "lengths": {length: 1},
                "batch_tokens": batch,
                "micro_batch_tokens": micro,
                "weights": {"text": 1},
                "learning_rate": rate,
            }
            | ({} if policy == "none" else {"recompute": policy})
        )
    total = sum(stage["tokens"] // stage["batch_tokens"] for stage in stages)
    every = max(1, min(1000, total // 5))
    held_out = {"unseen": {"path": f"{target}/data/held_out"}} if texts.held_out else {}
    return {
        "seed": 1,
        "precision": "fp32" if machine.device == "cpu" else "bf16",
        "directory": f"{target}/run",
        "parallel": {"tensor": 1, "zero_stage": zero_stage},
        "data": {
            "sources": {"text": {"path": f"{target}/data/train"}},
            "held_out": held_out,
            "tokenizer": f"{target}/tokenizer.model",
            "block_tokens": 16 * lengths[-1],
        },
        "optimizer": {"weight_decay": 0.1, "clip_norm": 1.0},
        "stages": stages,
        "checkpoint": {"every_steps": every, "keep_last": 2},
        "evaluate": {"every_steps": every, "max_tokens": max(16 * lengths[0], 32_768)},
        "log": {"audit_every_steps": every},
    }


def _falling(stages: int) -> list[float]:
    """The learning rate at the ends of the stages, as a share of the first: 1, 0.6, 0.3, 0.02."""
    middle = [0.6 * 0.5**index for index in range(stages - 1)]
    return [1.0, *middle, 0.02]


def _most_rows(size: str, length: int) -> int:
    """Rows of a micro batch at most: some thousand tokens fill a device, and memory grows."""
    return max(1, (4096 if size in ("tiny", "10m") else 8192) // length)


def _memory(run: RunConfig, machine: Machine) -> tuple[int, ...]:
    """Bytes of a rank in each stage, by `describe`'s own formulas."""
    return tuple(
        memory_per_rank(
            run.model,
            stage,
            tensor=1,
            data_degree=machine.ranks,
            zero_stage=run.parallel.zero_stage,
            precision=run.precision,
            device=machine.device,
        ).total
        for stage in run.stages
    )


def _too_large(size: str, memory: Sequence[int], run: RunConfig, machine: Machine) -> ConfigError:
    longest = max(run.stages[-1].lengths)
    smaller = list(SIZES)[: list(SIZES).index(size)]
    way_out = f"Use --size {either(smaller)}, shorter rows" if smaller else "Use shorter rows"
    return ConfigError(
        f"--size={size} takes {max(memory) / 2**30:.1f} GiB a rank with rows of {longest:,} and "
        f"everything recomputed, more than {machine.room / 2**30:.1f} GiB (80 % of "
        f"{machine.words}). {way_out} by --lengths, or a larger machine."
    )
