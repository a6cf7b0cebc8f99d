"""Listeners, which are called with every step and event: ledger, console, wandb, TensorBoard.

The only place that imports wandb. The trainer calls one `Listeners`, which calls the others.
"""

from megahybrid.train.listeners.base import Listener, ListenerFailed, Listeners, RunInfo
from megahybrid.train.listeners.console import Console
from megahybrid.train.listeners.ledger_listener import LedgerListener
from megahybrid.train.listeners.tensorboard_listener import TensorBoardListener
from megahybrid.train.listeners.wandb_listener import WandbListener

__all__ = [
    "Console",
    "LedgerListener",
    "Listener",
    "ListenerFailed",
    "Listeners",
    "RunInfo",
    "TensorBoardListener",
    "WandbListener",
]
