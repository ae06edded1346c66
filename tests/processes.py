"""Functions run by several gloo processes on the CPU, which rank 0 to n - 1 call together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# what takes seconds to import; nothing of ours, since the server's path is not pytest's
HEAVY = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.models.gpt2.modeling_gpt2",
         "transformers.models.qwen3.modeling_qwen3")
CONTEXT.set_forkserver_preload([*HEAVY])


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(function, size: int, *arguments, timeout: float = 120) -> list:
    """``function(world, *arguments)`` in ``size`` processes; what they return, by rank.

    A process that fails ends the others, as torchrun does; what stands in its place is the text of its exception,
    or its exit code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        started = [CONTEXT.Process(target=_work, args=(function, rank, size, port, scratch, arguments))
                   for rank in range(size)]
        for process in started:
            process.start()
        end = time.monotonic() + timeout
        while any(p.exitcode is None for p in started) and time.monotonic() < end:
            if any(p.exitcode for p in started):
                time.sleep(2)  # the others may be about to say the same
                break
            time.sleep(0.01)
        for process in started:
            if process.exitcode is None:
                process.kill()
            process.join()
        found = []
        for rank, process in enumerate(started):
            path = Path(scratch) / str(rank)
            found.append(torch.load(path, weights_only=False) if path.exists() else process.exitcode)
        return found


def results(function, size: int, *arguments, timeout: float = 120) -> list:
    """As ``run``, where no process may fail."""
    found = run(function, size, *arguments, timeout=timeout)
    for one in found:
        assert not isinstance(one, str | int), one
    return found


def _work(function, rank: int, size: int, port: int, scratch: str, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from opus_bench.distributed.world import World

    world = World.start()
    try:
        found = function(world, *arguments)
    except BaseException:
        torch.save(traceback.format_exc(), f"{scratch}/{rank}")
        os._exit(1)  # a group that lost a process cannot be left in order
    torch.save(found, f"{scratch}/{rank}.part")
    os.replace(f"{scratch}/{rank}.part", f"{scratch}/{rank}")
    world.stop()
