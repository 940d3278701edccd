"""`train`: runs all rounds of a run, with its evaluations, snapshots and results."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

from hosfl.methods.ledger import SeedReplay, WholeWeights
from hosfl.protocol.header import LogError
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.log import Log
from hosfl.protocol.provenance import Provenance
from hosfl.protocol.records import EpochRecord
from hosfl.protocol.terms import Diverged, NothingLearnt
from hosfl.runs import snapshot
from hosfl.runs.assemble import assemble, make_checked_task, with_task_clients
from hosfl.runs.checkpoint import check_free, load_config, load_id, next_epoch, save_id, save_module
from hosfl.runs.config import Config
from hosfl.runs.evaluate import evaluate
from hosfl.runs.federation import Federation
from hosfl.runs.report import Evaluation, Summary, Writer
from hosfl.runs.serve import Events, Transport
from hosfl.settings import differences
from hosfl.tasks.task import Task

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries of a round
log = logging.getLogger("hosfl.trainer")


def save_snapshot(federation: Federation, out: Path, round: int) -> None:
    """Save the server's state after `round` rounds. The log is on disk already, so it never lags behind a snapshot.

    Raises LogError if the log was removed, replaced or truncated: rounds could not be rebuilt from it.
    """
    log = log_of(federation)
    if log is not None:
        log.check_file()
    tensors, info = federation.server.state()
    counts = {
        "bytes": federation.messenger.wire.bytes,
        "visits": federation.visits,
        "passes": dict(federation.server.passes),
    }
    position = None if log is None else list(log.position)
    info = {"server": info, "counted": counts, "provenance": asdict(provenance_of(federation)), "log": position}
    snapshot.save(out, round, tensors, info, keep=federation.config.keep)


def log_of(federation: Federation) -> Log | None:
    """Return the log of a federation's client half; None if its method has none."""
    ledger = federation.server.ledger
    return ledger.log if isinstance(ledger, SeedReplay) else None


def provenance_of(federation: Federation) -> Provenance:
    """Return the digests of settings, data and model of a federation's run."""
    assert federation.provenance is not None, "running statistics are estimated first"
    return federation.provenance


def restore(federation: Federation, out: Path) -> int:
    """Load the newest snapshot in `out` that the log covers into a new federation. Returns its round.

    The federation's log must be open. Rounds committed after the snapshot become void, since the server has lost what
    it learnt in them. They are run again in a new epoch. Clients start from the base and catch up. Snapshots that are
    damaged, or of rounds that the log has lost, are skipped with a warning and renamed.

    Raises ProvenanceError for a snapshot of another run, LogError for a log of another history and for an empty one.
    """
    log = log_of(federation)

    def objection(saved: snapshot.Snapshot) -> str:
        path = out / f"snapshot-{saved.round:08d}.safetensors"
        provenance_of(federation).check(saved.info.get("provenance"), path)
        if log is None:
            return ""
        records, digest = saved.info["log"]
        if records > log.position[0]:
            if not log.position[0]:
                raise LogError(f"{log.path} has no record of the {saved.round} rounds that {path} holds: put it back")
            return f"is after {saved.round} rounds, and {log.path} lost its end: it has {len(log.rounds)}"
        if log.digest_after(records) != digest:
            raise LogError(f"{log.path} and {path} are of two runs: they differ in the first {saved.round} rounds")
        later_epochs = [r for r in log.records[records:] if isinstance(r, EpochRecord)]
        return "is of rounds that are void" if any(r.round < saved.round for r in later_epochs) else ""

    saved = snapshot.latest(out, objection)
    round = 0 if saved is None else saved.round
    if saved is not None:
        federation.server.load((saved.tensors, saved.info["server"]))
        federation.messenger.wire.bytes = dict(saved.info["counted"]["bytes"])
        federation.visits = saved.info["counted"]["visits"]
        federation.server.passes.update(saved.info["counted"]["passes"])
    snapshot.set_aside(out, round)
    ledger = federation.server.ledger
    if isinstance(ledger, SeedReplay) and log is not None:
        ledger.restart(log, round)
    elif isinstance(ledger, WholeWeights):
        ledger.epoch = next_epoch(out)  # before any round, since connected clients may hold weights of void rounds
    return round


def check_loss(loss: float, done: int) -> None:
    """Raises Diverged if the loss of an evaluation is infinite or NaN."""
    if not math.isfinite(loss):
        if not done:
            raise Diverged("the loss before the first round is not finite: look for NaN in the data")
        raise Diverged(f"the loss after round {done} is not finite: lower the learning rates")


def check_learnt(federation: Federation, done: int) -> None:
    """Raises NothingLearnt, with the first refusal's reason, if the server learnt from no cut in `done` rounds."""
    if done and not federation.server.learnt:
        raise NothingLearnt(": ".join([f"the server learnt from no cut in {done} rounds", *federation.refused[:1]]))


Progress = Callable[[int, float, Evaluation | None, int], None]  # rounds done, training loss, evaluation, bytes so far


def train(
    what: Task | Config,
    out: Path | str | None = None,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    transport: Transport | None = None,
    tensorboard: bool = False,
    **settings: Any,
) -> Summary:
    """Train a split model by HO-SFL or another method, and return the `Summary` of the run.

        summary = hosfl.train(task, rounds=100, server_rate=0.01, client_rate=0.1, out="runs/own")
        print(summary.accuracy, summary.loss, summary.replicas.equal)

        hosfl.train(hosfl.Config(task="digits", method="first-order"))  # a built-in task

    Args:
        what: the task as an object, with settings as further arguments; or a `Config`, which names its task.
        out: the folder for the run's files, created if necessary. None: nothing is written.
        progress: called after every round with the number of rounds done, the mean training loss of the round's
            clients, the `Evaluation` if one was due (else None), and the bytes sent so far.
        resume: continue the run in `out` from its last snapshot, however it ended. Task and settings must be those of
            that run; but data and model may be elsewhere, with the same content, and evaluate_every, snapshot_every
            and keep may change.
        transport: reaches clients in other processes or on other machines; needs `out`.
        tensorboard: also write event files for TensorBoard, into `out`/tensorboard. The run's bits are the same
            without.
        settings: with a `Task`, the settings of `Config` that are not to have their defaults, by name.

    During the run `out` has

        config.json         the settings
        provenance.json     the settings, and digests of data and model
        base.safetensors    the client half of round 0
        hosfl.log           the client half's updates, if the method has a log
        snapshot-*          the server's state, every `snapshot_every` rounds
        metrics.jsonl       a line for each evaluation

    and at the end client.safetensors, server.safetensors, curves.png and summary.json. The first Ctrl-C ends the run
    after the current round, with all of this written; `Summary.rounds` is the number of rounds done. If the start fails
    before the first round, the folder stays free.

    Raises:
        ValueError: settings do not fit the task, or the run to resume.
        TypeError: `what` is neither a `Task` nor a `Config`, or a setting does not exist.
        ProvenanceError: data, model or a file are another run's.
        FileExistsError: `out` holds another run.
        RunFolderError: another process works in `out`.
        LatticeError, Diverged: the run diverged; the results until then are written.
        NothingLearnt: all cuts of all rounds were refused or lost; the results until then are written.
        ImportError: a package is missing.
    """
    if out is not None and not str(out):
        raise ValueError("out is empty: name a folder")
    folder = Path(out) if out is not None else None
    begin = time.perf_counter()
    if (resume or transport or tensorboard) and folder is None:
        kind = "to resume" if resume else "with clients elsewhere" if transport else "for TensorBoard"
        raise ValueError(f"a run {kind} needs its folder: out, or --out DIR")
    if folder is not None and not resume:
        check_free(folder)
    config, task = _config_and_task(what, settings)
    if resume and folder is not None:
        changed = differences(load_config(folder).decisive(), config.decisive())
        if changed:
            raise ValueError(f"these are not the settings of the run in {folder}: {'; '.join(changed)}")
    federation, _ = assemble(config, task=task, resumed=folder if resume else None)
    writer = Writer(folder, tensorboard)
    loop = _RunLoop(federation, task, writer, begin, progress)
    try:
        if resume and folder is not None:
            writer.resume(federation.config, provenance_of(federation))
            federation.id = load_id(folder)
            federation.open_log(folder)
            loop.done = restore(federation, folder)
            save_module(federation.base, folder / "base.safetensors")
            loop.connect(transport)
        else:
            writer.claim_folder()
            loop.connect(transport)
            if config.calibrate:
                loop.calibrate()
            first = loop.evaluate()
            if folder is not None:
                save_module(federation.base, folder / "base.safetensors")
                save_id(federation.id, folder)
            writer.start(federation.config, provenance_of(federation))
            loop.last = writer.add(first)
            if folder is not None:
                federation.open_log(folder)
        return loop.run()
    except BaseException:
        federation.close()
        if not resume and not loop.done and loop.failure is None:
            writer.clear()
        raise
    finally:
        federation.close()
        writer.close()


def _config_and_task(what: Task | Config, settings: dict[str, Any]) -> tuple[Config, Task]:
    """Return the run's settings and its task. Raises TypeError, ValueError."""
    if isinstance(what, Config):
        if settings:
            raise TypeError(f"{', '.join(settings)} beside a Config: give them to Config, which has all settings")
        task = make_checked_task(what)
        return cast(Config, with_task_clients(what, task)), task
    if not isinstance(what, Task):
        raise TypeError(f"train needs a Task or a Config, not a {type(what).__name__}")
    for name in settings:
        if name not in Config.names():
            raise TypeError(f"there is no setting {name}: there are {', '.join(Config.names())}")
    if set(settings) & {"task", "options", "data", "model"}:
        raise TypeError("a Task has its own data and model: leave out task, options, data and model")
    config = Config(task="", **settings)
    task = what.with_public(config.public)
    return cast(Config, with_task_clients(config, task)), task


@dataclass
class _RunLoop:
    """The loop over a run's rounds, from its start or last snapshot.

    Attributes:
        federation, task, writer: of the run. progress: see `train`.
        begin: when the run began, by time.perf_counter().
        done: the number of rounds done.
        loss: the last round's training loss.
        last: the last evaluation.
        failure: the error that ended the run early.
        events: writes events.jsonl, if clients are on other machines.
        retry_at: when the next round may be tried again, by time.monotonic().
    """

    federation: Federation
    task: Task
    writer: Writer
    begin: float
    progress: Progress | None
    done: int = 0
    loss: float = math.nan
    last: Evaluation | None = None
    failure: LatticeError | Diverged | NothingLearnt | None = None
    events: Events | None = None
    retry_at: float = 0.0

    def connect(self, transport: Transport | None) -> None:
        """Make the federation use a transport, if there is one."""
        if transport is not None and self.writer.folder is not None:
            transport.connect(self.federation)
            self.federation.patient = transport.patient
            self.events = Events(self.writer.folder)

    def calibrate(self) -> None:
        """Wait for enough clients, and let them estimate running statistics."""
        while not self.federation.is_ready():
            self.wait()
        self.federation.calibrate()

    def evaluate(self) -> Evaluation:
        """Evaluate the model as it is now."""
        federation, config = self.federation, self.federation.config
        data = self.task.data(config.evaluate_on).to(config.device)
        scores, loss = evaluate(federation.model(), data, self.task)
        seconds, moved = time.perf_counter() - self.begin, dict(federation.messenger.wire.bytes)
        return Evaluation.of(self.done, scores, loss, self.loss, moved, seconds)

    def run(self) -> Summary:
        """Run all rounds and write the results. Raises `failure` once they are written."""
        federation, writer, folder = self.federation, self.writer, self.writer.folder
        config = federation.config
        with interruptible() as interrupted:
            if self.last is None:  # of a resumed run
                earlier = writer.reopen_metrics(self.done)
                self.begin -= earlier[-1].seconds if earlier else 0.0
                self.last = earlier[-1] if earlier else writer.add(self.evaluate())
            try:
                check_loss(self.last.loss, self.done)
                while self.done < config.rounds and not interrupted.is_set():
                    if federation.is_ready() and time.monotonic() >= self.retry_at:
                        self.round()
                    else:
                        self.wait()
                if folder is not None and interrupted.is_set():
                    self.snapshot(folder)
                if self.last.round != self.done:  # interrupted
                    self.last = writer.add(self.evaluate())
                    check_loss(self.last.loss, self.done)
                if self.done == config.rounds:
                    check_learnt(federation, self.done)
                federation.log_refusals()
            except (LatticeError, Diverged, NothingLearnt) as error:
                self.failure = error
            summary = Summary.of(
                config=config,
                rounds=self.done,
                last=self.last,
                clients=list(federation.clients.values()),
                visits=federation.visits,
                passes=federation.server.passes,
                refused=federation.refused,
                replicas=None if self.failure else federation.compare_replicas(),
                provenance=provenance_of(federation),
                seconds=time.perf_counter() - self.begin,
                failure=str(self.failure) if self.failure else None,
                lower_is_better=self.task.select_lower_is_better(self.last.scores),
            )
            if folder is not None:
                model = federation.model()
                save_module(model.client, folder / "client.safetensors")
                save_module(model.server, folder / "server.safetensors")
            writer.finish(summary)
        if self.failure is not None:
            raise self.failure
        return summary

    def round(self) -> None:
        """Run one round, and then the evaluation, snapshot and progress report that are due."""
        federation, folder, config = self.federation, self.writer.folder, self.federation.config
        loss = federation.round(self.done)
        if federation.tries:
            if federation.tries == 1:
                reasons = "; ".join(["", *federation.newest_refused])
                log.warning("round %d is tried again: the server could learn from no cut%s", self.done + 1, reasons)
            self.retry_at = time.monotonic() + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(federation.tries - 1, 20))
            return
        self.loss = loss
        self.done += 1
        if self.events is not None:
            self.events.round(federation, self.done, self.loss)
        self.writer.round(federation, self.done, self.loss)
        if self.done == 1 and not federation.server.learnt and federation.refused:
            log.warning("the server learnt from no cut in the first round: %s", federation.refused[0])
        due = self.done % config.evaluate_every == 0 or self.done == config.rounds
        if due:
            self.last = self.writer.add(self.evaluate())
            check_loss(self.last.loss, self.done)
        if folder is not None and (self.done % config.snapshot_every == 0 or self.done == config.rounds):
            self.snapshot(folder)
        if self.progress is not None:
            self.progress(
                self.done, self.loss, self.last if due else None, sum(federation.messenger.wire.bytes.values())
            )

    def wait(self) -> None:
        """Sleep briefly: too few clients are connected, or the pause before the next try is not over."""
        if self.events is not None:
            self.events.waiting(self.federation, self.done)
        time.sleep(0.1)

    def snapshot(self, folder: Path) -> None:
        """Save the server's state, after a check that the folder is still this run's."""
        if self.writer.lock is not None:
            self.writer.lock.check()
        save_snapshot(self.federation, folder, self.done)


_OPEN: list[threading.Event] = []  # the event of the outermost `interruptible` block


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Context manager that yields an event, which the first Ctrl-C sets; the second raises KeyboardInterrupt.

    A nested block yields the event of the outer one. In other threads than the main one the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    if _OPEN:
        yield _OPEN[0]
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    _OPEN.append(event)
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
        _OPEN.clear()
