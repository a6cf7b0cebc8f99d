"""A node without a network is found before ranks start on it: the processes of that check."""

import json
import subprocess
import sys
from pathlib import Path

from megahybrid.launch.pairs import find_bad_nodes, read_answers, rounds
from tests.faults.conftest import environment
from tests.launch.cluster import free_ports


def test_processes_of_a_node_without_a_network_fail_in_time_and_the_others_meet(
    tmp_path: Path,
) -> None:
    nodes = ["a", "b", "c"]
    (tmp_path / "rounds.json").write_text(json.dumps(rounds(nodes)))
    address = {"PAIR_ADDRESS": "127.0.0.1", "MASTER_PORT": str(free_ports(8))}
    address["CUDA_VISIBLE_DEVICES"] = ""  # NCCL would refuse to share one GPU
    started = []
    for node in nodes:
        more = {"GLOO_SOCKET_IFNAME": "none0"} if node == "b" else {}
        command = [sys.executable, "-m", "megahybrid.parallel.pair_check", "--node", node]
        command += ["--folder", str(tmp_path), "--seconds", "25"]
        started.append(subprocess.Popen(command, env=environment() | address | more, cwd=tmp_path))
    assert [process.wait(120) for process in started] == [0, 0, 0]
    answers = read_answers(tmp_path)
    assert len(answers) == 6
    verdict = find_bad_nodes(nodes, answers, 4)
    assert set(verdict.bad) == {"b"}
    assert verdict.summary.startswith("pairs: 1 of 3 reach each other, at ")
