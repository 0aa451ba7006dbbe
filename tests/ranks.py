"""Run a function on several ranks: forked processes, gloo on localhost, errors brought back.

Importing torch, megatron-core and deepspeed takes seconds, so ranks are forked from the test
process that has imported them. The parent keeps to one thread (set before torch starts any): a
thread pool does not survive a fork.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed  # imported here so that ranks need not
import pytest
import torch
from megatron.core import parallel_state  # noqa: F401

torch.set_num_threads(1)


@functools.cache
def _warm_up() -> None:
    """Do once what every rank would do: late imports, and DeepSpeed's look at its operators, which
    starts compilers. It takes a rank most of a second, which is as long as a tiny run's steps."""
    for name in (
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "megatron.core.datasets.helpers",
        "megatron.core.transformer.moe.experts",
        "megatron_salt.training.run",
    ):
        importlib.import_module(name)
    assert deepspeed.ops.__compatible_ops__
    # So that a rank's garbage collector does not touch, and thereby copy, what it has inherited.
    gc.collect()
    gc.freeze()


TIMEOUT_S = 240


def free_port() -> int:
    """A port for a launcher that is started at once; for ranks see `reserved_port`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def reserved_port() -> socket.socket:
    """A socket that keeps a free port for rank 0 to listen on, as long as it stays open.

    Between the choice of a port and its use another test's ranks may open hundreds of their own.
    The kernel hands out no port that is bound; rank 0 may bind it too, since this socket does not
    listen and both allow it.
    """
    keeper = socket.socket()
    keeper.bind(("127.0.0.1", 0))
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return keeper


def _rank_main(
    rank: int, world_size: int, port: int, pipe: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    # PyTorch makes the pool of a forked process anew when it is first asked for. Threads that ask
    # together (transformers reads weights in some) may find none; so this one asks before.
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:  # everything must reach the parent, SystemExit too
        pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        pipe.close()
        # Skips atexit handlers and destructors of process groups, which may wait for other ranks.
        os._exit(0)


class RankError(AssertionError):
    """A rank failed. `kind` and `message` are its exception's."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}\n{trace}")
        self.rank, self.kind, self.message, self.trace = rank, kind, message, trace


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank; returns their results in rank order.

    Results must be plain values or NumPy arrays: a tensor's memory is gone with the rank that sent
    it.

    Raises: RankError for the first rank that failed, TimeoutError after TIMEOUT_S seconds.
    """
    results: list[Any] = [None] * world_size
    for rank, value in _outcomes(world_size, function, args, TIMEOUT_S):
        if isinstance(value, RankError):
            raise value
        results[rank] = value
    return results


def run_ranks_to_the_end(
    world_size: int, timeout_s: float, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """As `run_ranks`, but every rank ends by itself; a failed one's result is its RankError.

    Raises: TimeoutError naming the ranks that still run after `timeout_s` seconds.
    """
    outcomes = dict(_outcomes(world_size, function, args, timeout_s))
    return [outcomes[rank] for rank in range(world_size)]


def _outcomes(
    world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> Iterator[tuple[int, Any]]:
    """(rank, result or RankError) as they come; the ranks are gone when this ends."""
    if torch.cuda.is_available():
        pytest.skip("forked ranks cannot use CUDA: CUDA_VISIBLE_DEVICES= make test")
    _warm_up()
    context = multiprocessing.get_context("fork")
    keeper = reserved_port()
    port = keeper.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world_size, port, theirs, function, args)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    waiting = set(range(world_size))
    deadline = time.monotonic() + timeout_s
    try:
        while waiting:
            ready = multiprocessing.connection.wait([pipes[r] for r in waiting], timeout=1.0)
            for rank in [r for r in waiting if pipes[r] in ready]:
                waiting.discard(rank)
                try:
                    succeeded, value = pipes[rank].recv()
                except EOFError:
                    processes[rank].join(5)
                    code = processes[rank].exitcode
                    succeeded, value = False, ("Died", f"exit code {code}", "")
                yield rank, value if succeeded else RankError(rank, *value)
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(waiting)} did not finish in {timeout_s} s")
    finally:
        for process in processes:
            if waiting:
                process.kill()
            process.join()
        keeper.close()
