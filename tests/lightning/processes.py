"""Running functions in processes of their own, which never outlive the test."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
from multiprocessing.connection import wait

import torch

# The processes fork from one server, which has imported what takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytorch_lightning", "tests.lightning.reference"])


def start(function, *args, environment=()):
    """Start ``function(*args)`` in a new process; return the process and the connection on which it will answer."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(theirs, dict(environment), function, args))
    process.start()
    theirs.close()
    return process, ours


def _answer(connection, environment, function, args):
    # A group of its own, so that its children can be killed with it.
    os.setpgrp()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.seed()
    try:
        answer = True, function(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send(answer)


def kill(process):
    """Kill a process and its children, unless it has ended well, and wait until it is gone."""
    if process.exitcode != 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def run(function, calls, seconds=100, environments=None):
    """Call ``function(*args)`` for the ``args`` of each call, all at once and each in a new process.

    Returns what they returned. Raises as soon as one of them fails, or if they are not done in time.
    """
    environments = environments or [{}] * len(calls)
    started = [start(function, *args, environment=env) for args, env in zip(calls, environments, strict=True)]
    deadline = time.monotonic() + seconds
    answers = {}
    try:
        while len(answers) < len(started):
            waiting = {connection: rank for rank, (_, connection) in enumerate(started) if rank not in answers}
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{function.__name__}: {sorted(waiting.values())} did not end in {seconds} s")
            for connection in ready:
                try:
                    fine, answer = connection.recv()
                except EOFError:
                    fine, answer = False, "the process died"
                if not fine:
                    raise RuntimeError(f"{function.__name__}, process {waiting[connection]}: {answer}")
                answers[waiting[connection]] = answer
    finally:
        for process, connection in started:
            process.join(5 if len(answers) == len(started) else 0)
            kill(process)
            connection.close()
    return [answers[rank] for rank in range(len(started))]


def run_ranks(function, world_size, *args, seconds=100):
    """Call ``function(rank, *args)`` on each rank of a group of processes, as a launcher such as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    ranks = range(world_size)
    environments = [{**group, "LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in ranks]
    return run(_on_rank, [(function, rank, *args) for rank in ranks], seconds, environments)


def _on_rank(function, rank, *args):
    answer = function(rank, *args)
    # Rank 0 keeps the group's store, so it leaves last.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return answer
