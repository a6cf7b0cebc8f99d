"""What context gain costs beside the plain loss: the windows of one context over one document.

The ratio is of CPU-seconds: all windows of a context c at stride c / 2 over one forward pass of the
document, which loss by position makes anyhow. The limit is 4.5 a context.

    python -m benchmarks.context_gain [--shape 25m] [--length 32768] [--contexts 8192] [--rounds 1]
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.machine import heading, machine, write
from benchmarks.shapes import SHAPES, hybrid, random_batch
from benchmarks.steps import our_model
from benchmarks.timing import in_turns
from megahybrid.evaluate.context_gain import beyond, default_stride, restarted_losses
from megahybrid.train.validation import evaluation_loss

LIMIT = 4.5


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of the plain loss and of each context's windows, in turns."""
    device, config = torch.device("cpu"), hybrid(options.shape)
    loss = evaluation_loss(our_model(config, device, torch.float32))
    tokens, targets = random_batch(config, 1, options.length, device)
    starts = torch.zeros_like(tokens)
    steps = [lambda: loss(tokens, targets, starts)]
    for context in options.contexts:
        stride = default_stride(context)
        # As many windows at once as the document has tokens for.
        rows = max(1, options.length // (context + stride))
        asked = (loss, tokens, targets, starts, context, stride, rows)
        steps.append(lambda asked=asked: restarted_losses(*asked))
    plain, *cut = in_turns(steps, device, options.rounds, warm_up=0)
    found = []
    for context, times in zip(options.contexts, cut, strict=True):
        pairs = zip(plain.cpu, times.cpu, strict=True)
        found.append(
            {
                "context": context,
                "ratio": statistics.median(after / before for before, after in pairs),
                "counted": int(beyond(targets, starts, context).sum()),
                "plain": plain.as_json(),
                "windows": times.as_json(),
            }
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """One line a context."""
    lines = [
        "| context | tokens counted | plain, CPU-s | windows, CPU-s | windows / plain | at most |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        plain, cut = one["plain"]["cpu_median"], one["windows"]["cpu_median"]
        lines.append(
            f"| {one['context']:,} | {one['counted']:,} | {plain:.1f} | {cut:.1f} "
            f"| {one['ratio']:.2f} | {LIMIT} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and keep every time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="25m", choices=SHAPES)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine(torch.device("cpu"))
    print(heading(facts))
    results = measure(options)
    print(table(results))
    write("context_gain_cpu", {"machine": facts, "options": vars(options), "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
