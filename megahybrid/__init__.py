"""Pretraining of layer-hybrid transformers in stages, under tensor, sequence and ZeRO degrees.

What a program needs stands here, imported when it is first used (docs/python.md):

    import megahybrid

    run = megahybrid.load_run("mine/run.yaml")
    folder = megahybrid.train("mine/run.yaml")
    model = megahybrid.load_model(folder)
    print(megahybrid.generate(model, "It was"))
"""

from typing import Any

__version__ = "0.2.0"

__all__ = [
    "Picture",
    "TokenDataset",
    "Tokenizer",
    "analyse",
    "draw_heads",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "load_run",
    "tokenize",
    "train",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'megahybrid' has no attribute '{name}'")
    from importlib import import_module

    place = "megahybrid.data.dataset" if name == "TokenDataset" else "megahybrid.api"
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
