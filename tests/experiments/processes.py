"""Programs of several processes on one machine, each with virtual devices of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(command, processes=2, devices=4):
    """Starts ``python`` with the same arguments in each process, but for <COORDINATOR>, <PROCESSES> and <PROCESS>."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    started = []
    for process in range(processes):
        arguments = [
            word.replace("<COORDINATOR>", coordinator)
            .replace("<PROCESSES>", str(processes))
            .replace("<PROCESS>", str(process))
            for word in command
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes))
    return started


def ends(started, timeout=300):
    """What each has printed, and its exit status. A program that hangs is ended, and fails."""
    try:
        outputs = [run.communicate(timeout=timeout)[0] for run in started]
    finally:
        for run in started:
            run.kill()
    return outputs, [run.returncode for run in started]
