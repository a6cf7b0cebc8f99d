"""The commands of `megahybrid data` that read texts, or make some: gather-stdlib,
make-chats, tokenizer, tokenize."""

import os
import sys
from typing import Literal


def gather(*, output: str) -> None:
    """Write Python's own library as a .jsonl."""
    from megahybrid.data_prep.gather_stdlib import gather_stdlib

    documents, size = gather_stdlib(output)
    print(f"{output}: {documents:,} documents, {size / 1e6:.1f} MB")


def make_chats(*, output: str, count: int, seed: int) -> None:
    """Write small conversations of our own making as a .jsonl."""
    from megahybrid.data_prep.made_chats import make_chats

    size = make_chats(output, count, seed)
    print(f"{output}: {count:,} conversations, {size / 1e6:.1f} MB")


def tokenizer(
    *,
    inputs: list[str],
    output: str | None,
    vocab_size: int | None,
    kind: Literal["bpe", "unigram"],
    sample_mib: int,
    special_token: list[str],
    chat: str | None,
    weight: list[float] | None,
    digits: str,
    spaces: str,
    against: str | None,
    eod: str | None,
    format: str,
    glob: str,
    field: str,
    seed: int,
) -> None:
    """Train a tokenizer; or, where the first input is `report` or `adopt` and no file, do that."""
    from megahybrid.errors import DataError

    if inputs[0] in ("report", "adopt") and not os.path.exists(inputs[0]):
        if inputs[0] == "adopt":
            _tokenizer_adopt(inputs=inputs, output=output, eod=eod, chat=chat)
        else:
            _tokenizer_report(
                inputs=inputs,
                against=against,
                eod=eod,
                sample_mib=sample_mib,
                seed=seed,
                field=field,
                format=format,
                glob=glob,
            )
        return
    for name, given in (("output", output), ("vocab-size", vocab_size)):
        if given is None:
            raise DataError(f"--{name} is missing. See `data tokenizer --help`.")
    assert output is not None and vocab_size is not None
    from megahybrid.data.chat.template_file import SHIPPED
    from megahybrid.data_prep.vocabulary import train_tokenizer

    info = train_tokenizer(
        inputs,
        output,
        vocab_size,
        kind=kind,
        sample_bytes=sample_mib * 2**20,
        seed=seed,
        text_field=field,
        format=format,
        pattern=glob,
        special_tokens=special_token,
        control_tokens=() if chat is None else SHIPPED[chat],
        weights=weight,
        digits_apart=digits == "apart",
        space_runs=spaces == "runs",
        print_line=print,
    )
    print(
        f"{output}: {info.kind}, vocab_size={info.vocab_size}, eod_id={info.eod_id}, "
        f"sha256 {info.sha256[:12]}"
    )


def _tokenizer_report(
    *,
    inputs: list[str],
    against: str | None,
    eod: str | None,
    sample_mib: int,
    seed: int,
    field: str,
    format: str,
    glob: str,
) -> None:
    from megahybrid.data_prep.tokenizer_report import print_report, report
    from megahybrid.errors import DataError

    _, *inputs = inputs
    if len(inputs) < 2:
        raise DataError("tokenizer report needs a tokenizer and inputs. Name both.")
    sources, used = report(
        inputs[0],
        inputs[1:],
        against=against,
        eod=eod,
        sample_bytes=sample_mib * 2**20,
        seed=seed,
        text_field=field,
        format=format,
        pattern=glob,
        print_line=print,
    )
    print_report(inputs[0], sources, used, against=against, eod=eod)


def _tokenizer_adopt(
    *, inputs: list[str], output: str | None, eod: str | None, chat: str | None
) -> None:
    from megahybrid.data.chat.template_file import SHIPPED
    from megahybrid.data_prep.tokenizer_report import adopt
    from megahybrid.errors import DataError

    if len(inputs) != 2 or not output:
        raise DataError("tokenizer adopt needs one tokenizer and --output. Name both.")
    info, changed = adopt(inputs[1], output, eod, () if chat is None else SHIPPED[chat])
    print(
        f"{output}: {info.kind}, vocab_size={info.vocab_size}, eod_id={info.eod_id}, "
        f"sha256 {info.sha256[:12]}"
    )
    for text in changed:
        print(f"not lossless: {text!r} does not come back as it was")


def tokenize_texts(
    *,
    inputs: list[str],
    tokenizer: str,
    output: str,
    held_out: float,
    longest: int,
    deduplicate: bool,
    seed: int,
    field: str,
    format: str,
    keep: list[str],
    glob: str,
    eod: str | None,
    workers: int,
    memory_mib: int,
    shard_tokens: int,
    max_bad_fraction: float,
    chat: str | None,
    template: str | None,
    chat_date: str | None,
    max_tokens: int | None,
    long_chats: Literal["leave-out", "cut"] | None,
) -> None:
    """Make shuffled token files of texts, or of conversations."""
    from megahybrid.data_prep.chat_options import chat_job, counted_targets
    from megahybrid.data_prep.tokenize import tokenize

    job = chat_job(chat, field, template, chat_date, max_tokens, long_chats)

    report = tokenize(
        inputs,
        tokenizer,
        output,
        held_out=held_out,
        longest=longest,
        deduplicate=deduplicate,
        seed=seed,
        text_field=field if chat is None else chat,
        format=format,
        kept=keep,
        pattern=glob,
        eod=eod,
        workers=workers,
        memory_bytes=memory_mib * 2**20,
        shard_tokens=shard_tokens,
        max_bad_fraction=max_bad_fraction,
        chat=job,
        quiet=not sys.stderr.isatty(),
        print_line=print,
    )
    for part, documents in report.documents.items():
        told = f"{report.output}/{part}: {documents:,} documents, {report.tokens[part]:,} tokens"
        if job is not None:
            told += f", {counted_targets(f'{report.output}/{part}'):,} of them targets"
        print(told)
    if report.duplicates:
        print(f"{report.duplicates:,} copies of documents left out")
    if report.kept:
        told = ", ".join(f"{name} of {count:,} rows" for name, count in report.kept.items())
        print(f"kept beside the tokens: {told}")
    if report.loss.empty:
        print(f"{report.loss.empty:,} documents without text left out")
    if report.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.bad.items())
        count = sum(report.bad.values())
        # How much a file was cut by, nothing in it may say.
        least = "at least " if any(reason.startswith("truncated") for reason in report.bad) else ""
        print(f"{report.output}/quarantine.jsonl: {count:,} bad ({reasons})")
        print(f"lost: {least}{report.loss}")
