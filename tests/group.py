"""Processes that form one Gloo group, and that cannot outlive or outwait the test that started them."""

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import torch
from torch import distributed

SECONDS = 240  # enough for imports on a machine with far more processes than cores

# They are forked from a process that has imported what takes long, and has done nothing else: one forked from the
# tests would inherit their threads' locks.
multiprocessing.set_forkserver_preload(["torch.distributed", "hosfl.optim"])


def start(function, *args, count=2):
    """Calls `function(rank, *args)` in `count` processes; returns a function that waits until all of them are done.

    That function raises AssertionError with the traceback of a process that failed, and TimeoutError after SECONDS.
    Either way the processes are killed: what Gloo and the libraries of the tests do when a process ends, where threads
    have been seen to wait for each other for ever, is not what is tested.
    """
    context = multiprocessing.get_context("forkserver")
    folder = tempfile.TemporaryDirectory()
    pipes, members = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        members.append(context.Process(target=_member, args=(theirs, folder.name, rank, count, function, args)))
        members[-1].daemon = True  # an interrupted test leaves none behind
        members[-1].start()
        theirs.close()
        pipes.append(ours)

    def join():
        end, waited = time.monotonic() + SECONDS, dict(zip(pipes, range(count), strict=True))
        try:
            while waited:
                ready = wait(list(waited), timeout=max(0, end - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"nothing from ranks {[*waited.values()]} within {SECONDS} s")
                for pipe in ready:
                    rank = waited.pop(pipe)
                    try:
                        error = pipe.recv()
                    except EOFError:
                        error = "the process ended"
                    assert not error, f"rank {rank}: {error}"
        finally:
            for member in members:
                member.kill()
                member.join()
            folder.cleanup()

    return join


def _member(pipe, folder, rank, count, function, args):
    faulthandler.dump_traceback_later(SECONDS - 20)
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
        function(rank, *args)
    except BaseException:
        pipe.send(traceback.format_exc())
    else:
        pipe.send(None)
    time.sleep(SECONDS)  # until killed
