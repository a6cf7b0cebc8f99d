"""An example of every command, shown in its help, and words for arguments that many share."""

# What an argument means that its command says nothing of.
HELP = {
    "run_file": "a run file, or one of megahybrid's own: pkg:runs/demo.yaml",
    "overrides": "fields to change, by dotted name: parallel.tensor=4",
    "second": "another one",
    "device": "where the model runs; auto is a GPU where there is one",
    "dtype": "numbers that are written",
    "paths": "a checkpoint's folder",
    "seed": "number that every draw is keyed by",
    "workers": "processes that read and encode",
    "shard_tokens": "tokens of one file at most",
    "method": "best_fit: whole documents; stream: one after another, cut",
    "min_document_tokens": "leave shorter documents out",
    "max_document_tokens": "leave longer documents out (default: none)",
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "megahybrid init mine --data books/    # from your text to a run file",
        "megahybrid check pkg:runs/demo.yaml --no-files",
    ),
    "init": ("megahybrid init mine --data books/ --size tiny --lengths 256,1k,4k",),
    "schema": ("megahybrid schema run > run.schema.json",),
    "completion": (
        'eval "$(megahybrid completion bash)"    # in ~/.bashrc; zsh the same',
        "megahybrid completion fish > ~/.config/fish/completions/megahybrid.fish",
    ),
    "train": (
        "megahybrid train mine/run.yaml",
        "megahybrid train pkg:runs/demo.yaml parallel.tensor=1 --processes 1",
    ),
    "check": (
        "megahybrid check mine/run.yaml",
        "megahybrid check pkg:runs/paper_rnope_swa_8b.yaml --world-size 64 --no-files",
    ),
    "describe": ("megahybrid describe pkg:runs/paper_rnope_swa_8b.yaml --world-size 64",),
    "compare": ("megahybrid compare runs/a runs/b",),
    "report": ("megahybrid report runs/a runs/b --html",),
    "watch": ("megahybrid watch runs/demo",),
    "study": ("megahybrid study experiments/length_extrapolation --jobs 2",),
    "evaluate": (
        "megahybrid evaluate runs/demo --beyond",
        "megahybrid evaluate runs/demo --context-gain 256 1024",
        "megahybrid evaluate runs/demo configs/suites/needles.yaml",
        "megahybrid evaluate runs/demo_chat chat",
        "megahybrid evaluate imported needles --data books=data/books/held_out",
    ),
    "analyse": ("megahybrid analyse runs/demo --length 1024 --picture heads.png",),
    "sample": ('megahybrid sample runs/demo --prompt "def " --tokens 50',),
    "export": ("megahybrid export runs/demo exported --dtype bf16",),
    "import": ("megahybrid import Llama-3.2-1B imported.yaml runs/imported",),
    "checkpoint": ("megahybrid checkpoint list runs/demo",),
    "checkpoint list": ("megahybrid checkpoint list runs/demo --json",),
    "checkpoint show": ("megahybrid checkpoint show runs/demo",),
    "checkpoint verify": ("megahybrid checkpoint verify runs/demo",),
    "checkpoint diff": ("megahybrid checkpoint diff runs/a runs/b --moments",),
    "checkpoint average": (
        "megahybrid checkpoint average runs/a/checkpoints/step-00000100 "
        "runs/a/checkpoints/step-00000200 --out averaged",
    ),
    "checkpoint fuse": ("megahybrid checkpoint fuse runs/a --plan fused.yaml --out fused",),
    "checkpoint collapse": ("megahybrid checkpoint collapse runs/fused --out collapsed",),
    "checkpoint resize-vocab": (
        "megahybrid checkpoint resize-vocab runs/a --tokenizer chat.model --out resized",
    ),
    "data": (
        "megahybrid data tokenizer corpus/ --output bpe.model --vocab-size 32000",
        "megahybrid data tokenize corpus/ --tokenizer bpe.model --output data/web --longest 2",
    ),
    "data demo": ("megahybrid data demo", "megahybrid data demo --chats"),
    "data gather-stdlib": ("megahybrid data gather-stdlib stdlib.jsonl",),
    "data make-chats": ("megahybrid data make-chats chats.jsonl --count 200",),
    "data tokenizer": (
        "megahybrid data tokenizer corpus/ --output bpe.model --vocab-size 32000",
        "megahybrid data tokenizer report bpe.model corpus/ --against other.model",
    ),
    "data tokenize": (
        "megahybrid data tokenize corpus/ --tokenizer bpe.model --output data/web "
        "--held-out 0.001 --longest 20",
    ),
    "data pack": ("megahybrid data pack data/web/train --length 65536 --output data/web-long",),
    "data shuffle": ("megahybrid data shuffle data/a data/b --output data/shuffled",),
    "data split": ("megahybrid data split data/a --held-out 0.01 --output data/parts",),
    "data merge": ("megahybrid data merge data/a data/b --output data/both",),
    "data import": (
        "megahybrid data import megatron/text --tokenizer bpe.model --output data/text",
    ),
    "data export": ("megahybrid data export data/web/train megatron/text",),
    "data verify": ("megahybrid data verify data/web/train",),
    "data inspect": ("megahybrid data inspect data/web/train --tokenizer bpe.model",),
    "data audit": ("megahybrid data audit runs/demo",),
    "launch": ("megahybrid launch submit RUN.yaml --site cluster --nodes 4 --dry-run",),
    "launch submit": ("megahybrid launch submit RUN.yaml --site cluster --nodes 4 --dry-run",),
    "launch status": ("megahybrid launch status runs/*",),
    "launch tail": ("megahybrid launch tail runs/demo --follow",),
    "launch stop": ("megahybrid launch stop runs/demo",),
    "launch save": ("megahybrid launch save runs/demo",),
    "launch cancel": ("megahybrid launch cancel runs/demo",),
    "launch requeue": ("megahybrid launch requeue runs/demo",),
    "launch nodes": ("megahybrid launch nodes runs/demo",),
}
