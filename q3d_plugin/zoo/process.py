"""One config in a process of its own, with a limit of time and memory."""

import multiprocessing
import os
import resource
import time

import torch

from q3d_plugin.adapter import Adapter
from q3d_plugin.zoo.examine import examine
from q3d_plugin.zoo.rows import Row

__all__ = ['in_process']


def _child(pipe, adapter: Adapter, config: str, forward: bool, int8: bool, memory: float) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    pipe.send(examine(adapter, config, forward, int8))
    pipe.close()


def in_process(
    adapter: Adapter, config: str, forward: bool, int8: bool, timeout: float, memory: float
) -> Row:
    """:func:`~q3d_plugin.zoo.examine.examine` in a process of its own.

    Args:
        adapter: Of the config's framework.
        config: Its path below the adapter's folder.
        forward: Whether to run the models.
        int8: Whether to run the quantized one in INT8, too.
        timeout: Seconds after which the process is ended.
        memory: GiB that it may allocate.

    Returns:
        Row: Where the process did not end well, what building alone shows, and the reason.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, adapter, config, forward, int8, memory))
    start = time.time()
    child.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        reason = f'not done after {timeout:.0f} s'
    except EOFError:
        child.join()
        reason = f'the process ended with {child.exitcode}'
    finally:
        child.join(0 if child.exitcode is None else None)
        if child.is_alive():
            child.kill()
        child.join()
    row = Row(adapter.name, config, seconds=time.time() - start)
    if forward:
        # What is known of a model that does not run in time is what its build says.
        row = in_process(adapter, config, False, False, timeout, memory)
        if not row.ours and not row.float_build:
            row.forward = reason
    else:
        row.float_build = reason
    return row
