"""`megahybrid sample --chat`: a conversation with a checkpoint's model in the terminal."""

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from megahybrid.commands.sample import check_sampling, tell_cropped
from megahybrid.commands.trained_model import TrainedModel, load_trained_model
from megahybrid.data.chat.guarded import GuardedTemplate
from megahybrid.data.chat.probe import Checked, check_template, variables_of
from megahybrid.data.chat.render import NotRendered
from megahybrid.data.chat.template_file import read_template
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import EXIT_DONE, ConfigError, tell
from megahybrid.evaluate.sampling import sample_tokens
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.printable import printable

YOU, MODEL = "you: ", "model: "


def chat(
    path: Path,
    mesh: ParallelMesh,
    *,
    template: str,
    system: str | None = None,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 1,
    tokenizer: Path | None = None,
    context: int | None = None,
    lines: Iterator[str] | None = None,
) -> int:
    """Answer each line that is typed (of `lines`, the standard input), until there is none.

    Each answer has up to `tokens` tokens and ends where the model ends its turn. The model sees the
    whole conversation, `system` first, or the last `context` tokens of it. Raises MegahybridError,
    one line, for whatever the user can mend. Returns the exit code.
    """
    check_sampling(tokens, temperature, context)
    if mesh.world.size > 1:
        raise ConfigError(
            f"--chat={template} is typed to one process, and {mesh.world.size} ranks were asked "
            "for. Leave --tensor out."
        )
    source = read_template(template, "--chat")
    trained = load_trained_model(path, mesh)
    words, eod_id = tokenizer_of(trained.run, tokenizer)
    file = Path(tokenizer or trained.run.data.tokenizer or "")
    with GuardedTemplate(source, variables_of(words, file), date.today().isoformat()) as guarded:
        checked = check_template(guarded, words)
        talk = _Talk(trained, words, guarded, checked, eod_id)
        if system is not None:
            talk.messages.append({"role": "system", "content": system})
        interactive = lines is None and sys.stdin.isatty()
        typed = lines or iter(sys.stdin.readline, "")
        while (line := _next(typed, interactive)) is not None:
            answer = talk.answer(line, tokens, temperature, seed, context)
            if answer is not None:
                print(MODEL + answer, flush=True)
    return EXIT_DONE


class _Talk:
    """A conversation so far, and the model that goes on with it."""

    def __init__(
        self,
        trained: TrainedModel,
        words: Tokenizer,
        template: GuardedTemplate,
        checked: Checked,
        eod_id: int,
    ) -> None:
        self.trained, self.words, self.template = trained, words, template
        self.checked, self.eod_id = checked, eod_id
        self.messages: list[dict[str, str]] = []

    def answer(
        self, line: str, tokens: int, temperature: float, seed: int, context: int | None
    ) -> str | None:
        """The model's answer; None where the line is not put to it, and why is told."""
        if spelt := next((token for token in self.checked.spelt if token in line), None):
            tell(f"{spelt} is a special token, which no message may spell. Write it otherwise.")
            return None
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = self.template.prompt(self.messages)
        except NotRendered as error:
            self.messages.pop()
            tell(f"the template does not render this ({error}).")
            return None
        (marked,) = self.words.encode_marked([prompt])
        found = sample_tokens(
            self.trained.model,
            marked.ids.tolist(),
            tokens=tokens,
            temperature=temperature,
            seed=seed + len(self.messages),  # other draws for each turn
            context_tokens=context or self.trained.length,
            vocab_size=self.words.info.vocab_size,
            eod_id=self.eod_id,
            ends=(self.checked.end_id,),
            cropped=lambda: tell_cropped(self.trained, context),
        )
        text = self.words.decode(found).strip()
        self.messages.append({"role": "assistant", "content": text})
        return "\n".join(map(printable, text.split("\n")))


def _next(lines: Iterator[str], interactive: bool) -> str | None:
    """The next line that says something; None at the end."""
    while True:
        if interactive:
            print(YOU, end="", flush=True)
        try:
            line = next(lines, "")
        except KeyboardInterrupt:
            line = ""
        if not line:
            if interactive:
                print()
            return None
        if line.strip():
            return line.strip()
