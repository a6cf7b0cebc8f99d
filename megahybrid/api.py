"""What a program or a notebook does with runs: the same as the commands, with values for answers.

The package's front has all of it: `megahybrid.load_run`, `megahybrid.train`, … Nothing heavy is
imported before it is used. Whatever the user can mend is a MegahybridError of one line.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megahybrid.errors import EXIT_RESUME, EXIT_USER_MISTAKE, ConfigError, MegahybridError

if TYPE_CHECKING:
    from megahybrid.commands.trained_model import TrainedModel
    from megahybrid.config import RunConfig

AnyPath = str | PathLike[str]
Data = AnyPath | Mapping[str, AnyPath]  # a dataset, or several by name
Device = Literal["auto", "cpu", "cuda"]
NAME = "megahybrid: "  # before each line of ours about what went wrong


def load_run(run_file: AnyPath, *overrides: str, world_size: int | None = None) -> "RunConfig":
    """Return the run that a file says, frozen, complete and checked.

    `overrides` change fields: "parallel.tensor=2". `world_size` is the number of ranks; without it
    what only that can tell is left out. Raises ConfigError, a line for each mistake.
    """
    from megahybrid.config import check_run, load

    run = load(fspath(run_file), overrides)
    check_run(run, world_size)
    return run


def train_tokenizer(
    texts: AnyPath | Sequence[AnyPath], output: AnyPath, *, vocab_size: int, seed: int = 0
) -> "Tokenizer":
    """Train a byte-level BPE on texts, write it as `output` (a `.model` file) and return it.

    `texts` are files and folders of text, JSON lines, Parquet and more (docs/data.md). The same
    texts give the same bytes. Raises DataError.
    """
    from megahybrid.data_prep.vocabulary import train_tokenizer as write

    write(_paths(texts), fspath(output), vocab_size, seed=seed)
    return Tokenizer(output)


def tokenize(
    texts: AnyPath | Sequence[AnyPath],
    tokenizer: AnyPath,
    output: AnyPath,
    *,
    held_out: float = 0.0,
    seed: int = 0,
) -> Path:
    """Write texts as shuffled token files, `output`/train and, of so large a share of the
    documents, `output`/held_out; return `output`.

    A call that was interrupted goes on when it is made again. Raises DataError where nothing is to
    be read, or where a part would be empty.
    """
    from megahybrid.data_prep.tokenize import tokenize as write

    write(
        _paths(texts), fspath(tokenizer), fspath(output), held_out=held_out, seed=seed, quiet=True
    )
    return Path(output)


def _paths(given: AnyPath | Sequence[AnyPath]) -> list[str]:
    return [fspath(one) for one in ([given] if isinstance(given, str | PathLike) else given)]


def train(run_file: AnyPath, *overrides: str, processes: int | None = None) -> Path:
    """Train a run, or go on with it where it stopped, in processes of their own; return its folder.

    `processes` is the number of ranks on this machine (default: as many as fit). What they print
    goes where this process prints. Raises ConfigError where nothing was begun, MegahybridError
    with the exit code of the first rank that failed.
    """
    run = load_run(run_file, *overrides)
    command = [sys.executable, "-m", "megahybrid", "train", fspath(run_file), *overrides]
    if processes is not None:
        command += ["--processes", str(processes)]
    ended = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    # Through this process's own streams, which a notebook shows and a file descriptor does not.
    told = _passed_on(ended)
    if ended.returncode == 0:
        return run.run_directory(fspath(run_file))
    ours = [line.removeprefix(NAME) for line in told if line.startswith(NAME)]
    if ended.returncode == EXIT_USER_MISTAKE and ours:
        raise ConfigError(*ours)
    if ended.returncode == EXIT_RESUME:
        ours = ["the run stopped early after saving. Call train again to go on."]
    error = MegahybridError(*(ours[-1:] or [f"training ended with code {ended.returncode}."]))
    error.exit_code = ended.returncode
    raise error


def _passed_on(process: "subprocess.Popen[str]") -> list[str]:
    """Print what a process says as it says it; return the last lines of its stderr when it ends."""
    from collections import deque
    from threading import Thread

    assert process.stdout is not None and process.stderr is not None
    last: deque[str] = deque(maxlen=20)

    def errors(stream: Iterable[str]) -> None:
        for line in stream:
            last.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr)

    reader = Thread(target=errors, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            print(line, end="")
        process.wait()
    except BaseException:
        process.terminate()  # it saves and ends
        process.wait()
        raise
    finally:
        reader.join()
    return list(last)


def load_model(
    checkpoint: AnyPath, *, device: Device = "auto", changes: Sequence[str] = ()
) -> "TrainedModel":
    """Return the model of a checkpoint's folder, or of a run's newest one, whole in this process.

    `.model` is the torch module, `.run` its config, `.step` and `.tokens` where it stood. fp32 on a
    CPU, the run's precision on CUDA. `changes` look at it with a scheme changed:
    "local.window=null". Raises CheckpointError where a byte is damaged or missing.
    """
    from megahybrid.commands.trained_model import load_trained_model
    from megahybrid.parallel.mesh import ParallelMesh, choose_device

    mesh = ParallelMesh.single(choose_device(device, local_rank=0))
    return load_trained_model(Path(checkpoint), mesh, changes)


def generate(
    model: "TrainedModel",
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 1,
    tokenizer: AnyPath | None = None,
    context: int | None = None,
) -> str:
    """Return `prompt` and up to `tokens` tokens that follow it, until a document ends.

    temperature 0 takes the likeliest; the same seed gives the same text. The tokenizer is the
    run's, or a file. The model sees the last `context` tokens (default: as it was trained). Raises
    ConfigError for a prompt without text.
    """
    from megahybrid.commands.sample import continued

    file = None if tokenizer is None else Path(tokenizer)
    return continued(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        tokenizer=file,
        context=context,
    )


def evaluate(
    model: "TrainedModel | AnyPath",
    *,
    data: Data | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Return held-out loss and loss by position: what `megahybrid evaluate --json` prints.

    `["scores"]` has an entry for each held-out set of the run (or of `data`) and each way of making
    rows: "stream" as in training, "documents" from each document's beginning, with `loss` in nats a
    token, `perplexity`, and `positions`. Rows have `length` tokens (default: as in training), of
    `max_tokens` in all at most. Raises ConfigError, DataError or CheckpointError.
    """
    from megahybrid.commands.evaluate import scores

    trained = load_model(model) if isinstance(model, str | PathLike) else model
    return scores(trained, data=_sets(data), length=length, max_tokens=max_tokens)


def analyse(
    model: "TrainedModel | AnyPath",
    *,
    data: Data | None = None,
    length: int | None = None,
    depth: float = 0.5,
    trials: int = 8,
    tokenizer: AnyPath | None = None,
) -> dict[str, Any]:
    """Return what the heads look at while they answer: what `megahybrid analyse --json` prints.

    `trials` sentences, each hidden at `depth` (0 to 1) in a text of `length` tokens (default: as in
    training), are asked for at its end. The text is repeated noise, or that of the first dataset
    of `data`. `["results"][0]["attention"]` has mass, entropy, distance and retrieval by layer and
    head (docs/evaluation.md); `draw_heads` draws it. Raises ConfigError, DataError or
    CheckpointError.
    """
    from megahybrid.commands.analyse import Looked, analysis

    looked = Looked(
        data=_sets(data),
        length=length,
        depth=depth,
        trials=trials,
        tokenizer=None if tokenizer is None else Path(tokenizer),
    )
    trained = load_model(model) if isinstance(model, str | PathLike) else model
    return analysis(trained, looked)


def draw_heads(analysis: Mapping[str, Any]) -> "Picture":
    """Return a picture of what `analyse` found: each layer's mass by segment of the text, and each
    head's mass on the hidden sentence while it answers."""
    from megahybrid.report.head_picture import draw_heads as drawn

    return Picture(drawn(dict(analysis)))


def _sets(data: "Data | None") -> dict[str, Path] | None:
    """Return datasets by name, a single one under its folder's."""
    if data is None:
        return None
    if isinstance(data, str | PathLike):
        return {Path(data).resolve().name: Path(data)}
    return {name: Path(path) for name, path in data.items()}


@dataclass(frozen=True)
class Picture:
    """A PNG, which a notebook shows where it is a cell's last value."""

    png: bytes = field(repr=False)

    def save(self, path: AnyPath) -> Path:
        """Write the file and return its path."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def _repr_png_(self) -> bytes:
        return self.png


def export(
    checkpoint: AnyPath,
    out: AnyPath,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    architecture: str | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Write a checkpoint as a folder for transformers, run and compared before it counts; return
    the folder.

    `architecture` names a Hugging Face class (default: the first that computes the same),
    `tokenizer` a file or "none" (default: the run's). Raises InteropError where no class can.
    """
    from megahybrid.interop.export import export as write

    write(Path(checkpoint), Path(out), dtype=dtype, architecture=architecture, tokenizer=tokenizer)
    return Path(out)


class Tokenizer:
    """A sentencepiece `.model`, a `tokenizer.json`, or a folder with one of them.

    `eod` names the token that follows every document, where the file's own is another. Raises
    DataError for a file that is none.
    """

    def __init__(self, path: AnyPath, *, eod: str | None = None) -> None:
        from megahybrid.data.tokenizer import load_tokenizer

        self._path = Path(path)
        self._tokenizer = load_tokenizer(self._path, eod)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.info.vocab_size

    @property
    def eod_id(self) -> int:
        """The id that follows every document."""
        return self._tokenizer.info.eod_id

    def encode(self, text: str, *, eod: bool = False) -> list[int]:
        """Return the ids of a text; special tokens in it are text. `eod` puts the end of a document
        behind it, a target like another for a model that is to end there."""
        return [*self._tokenizer.encode([text])[0], *([self.eod_id] if eod else [])]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._tokenizer.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; the end of a document and other control tokens give none."""
        return self._tokenizer.decode(ids)

    def token_id(self, token: str) -> int:
        """Return the id of a token by its own name, special ones too: "<|im_end|>". Raises
        DataError where there is none."""
        from megahybrid.errors import DataError
        from megahybrid.printable import shortened

        found = self._tokenizer.token_id(token)
        if found is None:
            raise DataError(
                f"{self._path} has no token '{shortened(token)}' ({self.vocab_size:,} tokens). "
                "Reserve it when the tokenizer is trained: --special-token."
            )
        return found
