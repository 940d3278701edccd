"""Running a study's jobs, one after another or in several processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from typing import Any

import torch

from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.terms import Diverged, NothingLearnt
from hosfl.runs.report import Evaluation, machine, metric
from hosfl.runs.trainer import train
from hosfl.studies.study import Job, Result

_warm: list[str] = []  # not empty once this process has trained


def run_job(job: Job) -> Result | None:
    """Train, and return settings, outcome and evaluations; None if interrupted.

    A run that diverges, learns nothing, or ends with a first score that is not finite, has a "failure".
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluations: list[Evaluation] = []
    begin, done = time.perf_counter(), 0

    def progress(round: int, loss: float, evaluation: Evaluation | None, moved: int) -> None:
        nonlocal done
        done = round
        if evaluation is not None:
            evaluations.append(evaluation)

    outcome: dict[str, Any] = {"failure": None}
    try:
        if not _warm:  # one round that is not timed, for imports and caches
            _warm.append(job.config.task)
            if train(replace(job.config, rounds=1, server_first=0)).interrupted:
                return None
            begin = time.perf_counter()
        summary = train(job.config, None, progress)
        if summary.interrupted:
            return None
        if not math.isfinite(summary.accuracy):  # trials cannot be compared by it, and JSON cannot hold it
            raise Diverged(f"the {metric(summary.scores)} after round {summary.rounds} is not finite")
        # Without the peak memory: it is the process's, which may have made other runs.
        outcome |= {k: v for k, v in asdict(summary).items() if k not in ("config", "peak_memory", "interrupted")}
    except (LatticeError, Diverged, NothingLearnt) as error:
        outcome |= {"failure": str(error), "rounds": done, "machine": machine()}
        outcome["seconds"] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    result = {"phase": job.phase, "method": job.method, "trial": job.trial, "config": asdict(job.config)}
    return {**result, **outcome, "evaluations": [asdict(e) for e in evaluations]}


def _worker(parent: int) -> None:
    """Initialise a process of the pool: it ignores Ctrl-C, which its parent handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result | None]]:
    """Run jobs in so many processes, and yield each with its result when it is done. One worker: in this process.

    Raises ChildProcessError, after all available results, if the system kills a process.
    """
    if workers == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker, initargs=(os.getpid(),))
    # The processes inherit the blocked signal, so that a Ctrl-C does not reach them while they import torch. In this
    # thread it is only delayed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            futures = {pool.submit(run_job, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        broken = False
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                broken = True
            else:
                yield futures[future], future.result()
        if broken:
            raise ChildProcessError(
                "the system killed one of the study's processes, most likely for lack of memory: the same command goes"
                " on where it was, and fewer --jobs need less"
            )
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # it has written nothing
        raise
    finally:
        pool.shutdown(cancel_futures=True)
