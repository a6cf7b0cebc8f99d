"""The check of a node's links to its neighbours, one task per node, before ranks start.

python -m megahybrid.parallel.pair_check --folder DIR --seconds 60

DIR/rounds.json holds rounds of pairs of node names. A pair is an all-reduce between two processes
of their own, which are killed when the round's time is up: a library that waits for a dead peer
does not come back by itself. The results go to DIR/node-NODE.json.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megahybrid.heartbeat import write_whole

REPEATS = 3
CPU_BYTES, GPU_BYTES = 4 * 2**20, 64 * 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every pair of this node, or with --pair one of them.

    Returns 0 whether or not they work.
    """
    parser = argparse.ArgumentParser(prog="pair_check", description="Do nodes reach each other?")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="that a round may take")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    parser.add_argument("--pair", nargs=3, metavar=("ADDRESS", "PORT", "RANK"))
    wanted = parser.parse_args(arguments)
    if wanted.pair:
        address, port, rank = wanted.pair
        print(json.dumps(all_reduce_speed(address, int(port), int(rank), wanted.seconds)))
        return 0
    began, answers = time.monotonic(), []
    port = int(os.environ["MASTER_PORT"])
    for number, pairs in enumerate(json.loads((wanted.folder / "rounds.json").read_text()), 1):
        for pair in pairs:
            port += 1  # a port for each pair: several nodes may share a host
            if wanted.node in pair:
                # A peer may be late by the rounds in which its own peers did not answer.
                seconds = began + number * wanted.seconds - time.monotonic()
                answers.append(_in_time(pair, wanted.node, port, max(1.0, seconds)))
    write_whole(wanted.folder / f"node-{wanted.node}.json", json.dumps(answers))
    return 0


def _in_time(pair: list[str], node: str, port: int, seconds: float) -> dict:
    """Check one pair in a process of its own."""
    # Given by the site where nodes share a host whose name is not theirs.
    address = os.environ.get("PAIR_ADDRESS") or pair[0]
    command = [sys.executable, "-m", "megahybrid.parallel.pair_check", "--folder", ".", "--seconds"]
    command += [str(seconds), "--pair", address, str(port), str(pair.index(node))]
    answer = {"pair": pair, "gib_per_second": None, "error": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 5)
    except subprocess.TimeoutExpired:
        return answer | {"error": f"no answer in {seconds:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        return answer | {"error": last[0][:200]}
    return answer | {"gib_per_second": json.loads(done.stdout.strip().splitlines()[-1])}


def all_reduce_speed(address: str, port: int, rank: int, seconds: float) -> float:
    """GiB/s of an all-reduce between two processes that meet at `address`, its result checked."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda:0" if cuda else "cpu")
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, 2, is_master=rank == 0, timeout=limit)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=2, timeout=limit
    )
    nbytes = GPU_BYTES if cuda else CPU_BYTES
    fastest = float("inf")
    for _ in range(1 + REPEATS):  # the first one connects
        values = torch.full((nbytes // 4,), float(rank + 1), device=device)
        began = time.perf_counter()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
        if not bool((values == 3).all()):
            raise ArithmeticError("1 + 2 came out as another number")
    dist.destroy_process_group()
    return nbytes / fastest / 2**30


if __name__ == "__main__":
    sys.exit(main())
