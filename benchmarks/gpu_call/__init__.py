"""One call on one GPU: parts in the order of their worth, each a process with a limit of its own,
and a line of results on the disk as soon as a figure is known.

    python -m benchmarks.gpu_call [--rehearse] [--only PART …] [--after RESULTS.jsonl]

`make gpu-call` collects what such a machine lacks and prints the line to run there.
"""
