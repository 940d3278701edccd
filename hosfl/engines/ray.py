"""The engine for a Ray cluster of one owner: a few actors answer for all clients.

Anyone who can reach a Ray cluster can run code in it. So it is for networks in which every machine is trusted; clients
of other owners need another engine.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from hosfl.engines.engine import EngineError, Reply, check_ask
from hosfl.extras import require

Answer = Callable[[int, bytes], bytes]

NO_ACTOR = -1  # in place of an actor's number
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}  # a cluster that we start does not report to Ray's makers
log = logging.getLogger(__name__)


class RayEngine:
    """The engine of one owner's cluster: requests are calls of Ray actors, each of which answers for many clients.

    A client belongs to the actor of its number modulo the number of actors, which keeps its state between requests. If
    an actor dies, that state is lost: its clients start again from the base. Ray restarts the actor; until then others
    answer for it.

    make: called once in each actor, and again in a restarted one; returns the function that answers there: (client, the
    server's bytes) -> bytes. It must be picklable, as instances of a class in a module are, and the cluster's machines
    must have this Python, Ray and hosfl.
    clients: N; their numbers are 0 to N - 1.
    actors: None: as many as the cluster has room for, and N or fewer.
    address: "HOST:PORT" of a cluster to join, or "auto" for the one on this machine. None: one is started here, and
    ends with `close`. A program that is in a cluster already stays in it.
    cpus, gpus: of each actor, as Ray counts them. An actor computes with as many threads as it has CPUs, or one.
    patience: seconds for all actors to have called `make`.

    Raises EngineError with the reason if the actors cannot start; ImportError without Ray.
    """

    def __init__(
        self,
        make: Callable[[], Answer],
        clients: int,
        actors: int | None = None,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        patience: float = 600.0,
    ) -> None:
        if clients < 1 or (actors is not None and actors < 1) or cpus < 0 or gpus < 0:
            raise ValueError(
                f"clients = {clients}, actors = {actors}, cpus = {cpus}, gpus = {gpus}: one client or more, one actor"
                " or more, and no share below 0 are needed"
            )
        self._ray = require("ray", "the engine ray", "ray")
        self.clients = clients
        self._actors: list[Any] = []
        self._calls: dict[Any, _Call] = {}  # by Ray's reference to the result: one for each busy actor
        self._away: dict[int, Any] = {}  # by dead actor: the call that ends when it is back; None if it will not be
        self._started = not self._ray.is_initialized()
        if self._started:
            _init_ray(self._ray, address, None if actors is None else max(1, math.ceil(actors * cpus)))
        try:
            self._start(make, min(clients, actors or self._max_actors(cpus, gpus)), cpus, gpus, patience)
        except BaseException:
            self.close()
            raise

    def _max_actors(self, cpus: float, gpus: float) -> int:
        """Return the number of actors for which the cluster has resources."""
        resources = self._ray.cluster_resources()
        limits = [resources.get(name, 0) / share for name, share in (("CPU", cpus), ("GPU", gpus)) if share]
        return max(1, int(min(limits, default=1)))

    def _start(self, make: Callable[[], Answer], count: int, cpus: float, gpus: float, patience: float) -> None:
        ray = self._ray
        try:
            self._make = ray.put(ray.cloudpickle.dumps(make))  # once for all actors
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise EngineError(f"what makes the clients does not pickle: {_reason(error)}") from error
        gpus_here = ray.cluster_resources().get("GPU", 0)
        if self._started and gpus_here < count * gpus:  # a cluster that was joined may grow
            raise EngineError(
                f"{count} actors of {gpus:g} GPUs each were asked for, and this machine has {gpus_here:g} GPUs"
            )
        threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}  # whatever this process has it set to
        actor = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0, runtime_env={"env_vars": threads}
        )(_Actor)
        self._actors = [actor.remote() for _ in range(count)]
        missing = {self._call_make(actor) for actor in self._actors}
        ends = time.monotonic() + patience
        while missing:
            done, _ = ray.wait(list(missing), timeout=max(0.0, ends - time.monotonic()))
            if not done:
                raise EngineError(
                    f"{len(missing)} of {count} actors had not started after {patience:g} s. Each needs {cpus:g} CPUs"
                    f" and {gpus:g} GPUs, and the cluster has {_resources(ray.cluster_resources())},"
                    f" {_resources(ray.available_resources())} of them free. Ask for fewer actors, or for smaller ones"
                )
            missing -= set(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                raise EngineError(f"the clients cannot be made: {_reason(error)}") from error

    def present(self) -> frozenset[int]:
        """Return all clients if any actor is alive. One that has died since the last request still counts."""
        self._find_restarted()
        return frozenset(range(self.clients)) if len(self._away) < len(self._actors) else frozenset()

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """See `Engine.ask`. One request at a time: a new one drops the replies that the last one still waits for.

        An actor gets one client's bytes at a time; those still queued when a request ends are never sent. An actor that
        is busy with an earlier request takes this one's when it is done. If an actor dies, the client that it was
        answering for is "gone", and its queued clients go to other actors. A client's error is in its actor's Ray log.

        Raises EngineError for clients that do not exist, if no actor can be restarted, and if the engine is closed.
        """
        check_ask(messages, self.clients)
        return self._replies(messages, deadline)

    def _replies(self, messages: Mapping[int, bytes], deadline: float | None) -> Iterator[Reply]:
        ends = math.inf if deadline is None else time.monotonic() + deadline
        self._find_restarted()
        request = object()  # marks the calls of this request
        unanswered = dict.fromkeys(messages)  # clients, in order
        queues: defaultdict[int, deque[int]] = defaultdict(deque)  # of clients, by actor
        for client in messages:
            queues[self._actor_of(client)].append(client)
        while unanswered:
            for client in queues.pop(NO_ACTOR, ()):
                del unanswered[client]
                yield Reply(client, None, "gone")
            if not self._actors:
                raise EngineError("the engine was closed during a request")
            seconds_left = ends - time.monotonic()
            for actor in queues.keys() - {call.actor for call in self._calls.values()}:
                if queues[actor] and seconds_left > 0:
                    client = queues[actor].popleft()
                    reference = self._actors[actor].answer.remote(client, messages[client])
                    self._calls[reference] = _Call(request, client, actor)
            done = self._wait(self._calls, seconds_left)
            if done is None:
                break
            call = self._calls.pop(done)
            reply = self._reply(call, done)
            if call.actor in self._away:
                for client in queues.pop(call.actor, ()):
                    queues[self._actor_of(client)].append(client)
            if call.request is request:
                del unanswered[call.client], done  # Ray keeps an answer in memory while its reference is held
                yield reply
        for client in unanswered:
            yield Reply(client, None, "late")

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Do nothing: `make` has what clients need."""

    def limit(self, largest: int) -> None:
        """Do nothing: the actors are trusted."""

    def close(self) -> None:
        """End the actors and their clients, and the cluster if it was started here."""
        actors, self._actors = self._actors, []
        self._calls.clear()
        self._away.clear()
        if self._ray.is_initialized():
            for actor in actors:
                self._ray.kill(actor)
            if self._started:
                self._ray.shutdown()
        self._started = False

    def _actor_of(self, client: int) -> int:
        """Return the number of the actor that answers for a client now; NO_ACTOR if all are dead."""
        actor = client % len(self._actors)
        if actor not in self._away:
            return actor
        alive = [actor for actor in range(len(self._actors)) if actor not in self._away]
        return alive[client % len(alive)] if alive else NO_ACTOR

    def _wait(self, calls: Collection[Any], seconds: float) -> Any:
        """Wait for one of the calls to end, and return its reference; None if none does within so many seconds."""
        if not calls:
            return None
        done, _ = self._ray.wait(list(calls), timeout=None if seconds == math.inf else max(0.0, seconds))
        return done[0] if done else None

    def _reply(self, call: _Call, reference: Any) -> Reply:
        """Return the reply of a call that has ended. If its actor has died, begin to wait for its restart."""
        try:
            answer, reason = self._ray.get(reference), "it was restarted since it was last asked"
        except self._ray.exceptions.RayError as error:
            answer, reason = None, _reason(error)
        if answer is None:
            if call.actor not in self._away:
                log.warning("actor %d is away, and client %d gone: %s", call.actor, call.client, reason)
                self._away[call.actor] = self._call_make(self._actors[call.actor])
            return Reply(call.client, None, "gone")
        if isinstance(answer, bytes):
            return Reply(call.client, answer)
        return Reply(call.client, None, f"failed: {answer}")

    def _call_make(self, actor: Any) -> Any:
        """Call `make` in an actor. Returns the reference of the call, which survives restarts of the actor."""
        return actor.make_answer.options(max_task_retries=-1).remote(self._make)

    def _find_restarted(self) -> None:
        """Remove the dead actors that are back from `_away`. Raises EngineError if no actor can come back."""
        if not self._actors:
            raise EngineError("this engine is closed: make another")
        for actor, call in list(self._away.items()):
            if call is None or self._wait([call], 0.0) is None:
                continue
            try:
                self._ray.get(call)
                del self._away[actor]
            except self._ray.exceptions.RayError as error:
                log.error("actor %d will not be back: %s", actor, _reason(error))
                self._away[actor] = None
        if list(self._away.values()) == [None] * len(self._actors):
            raise EngineError("no actor is left, and Ray brings none back: see the log of hosfl.engines.ray")


class _Call(NamedTuple):
    """A running call of an actor, perhaps for a request that has ended."""

    request: object
    client: int
    actor: int


class _Actor:
    """The Ray actor, which runs in its own process."""

    def __init__(self) -> None:
        self._answer: Answer | None = None

    def make_answer(self, make: bytes) -> None:
        """Call `make`, unless that was done in this process."""
        if self._answer is None:
            self._answer = pickle.loads(make)()

    def answer(self, client: int, data: bytes) -> bytes | str | None:
        """Return the client's bytes; or the class of its error, a str; or None if this process was restarted."""
        if self._answer is None:
            return None
        try:
            answer = self._answer(client, data)
            if not isinstance(answer, bytes):
                raise TypeError(f"bytes are needed, not {type(answer).__name__}")
            return answer
        except (Exception, SystemExit) as error:  # Ray does not restart an actor that exits
            log.exception("client %d could not answer", client)
            return type(error).__name__


def _init_ray(ray: Any, address: str | None, cpus: int | None) -> None:
    """Join a cluster, or start one with this number of CPUs (None: all of this machine)."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), 10).close()  # else Ray would try for minutes
        if address is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        where = "start" if address is None else f"be joined at {address}"
        raise EngineError(f"Ray's cluster cannot {where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the last line of an error's message: Ray puts an actor's traceback before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _resources(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
