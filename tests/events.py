"""The events of a ledger by name, as tests look for them."""

from megahybrid.ledger import EventLine, Ledger


def named(ledger: Ledger, event: str) -> list[EventLine]:
    """The event lines of one name."""
    return [line for line in ledger.events if line.event == event]
