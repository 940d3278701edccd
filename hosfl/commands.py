"""The commands that need torch. `hosfl.cli` has the others, and all options."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hosfl.engines.engine import Engine
from hosfl.extras import require
from hosfl.files import write_json
from hosfl.halves.hub import meta_model
from hosfl.halves.split import cut_points
from hosfl.references import short_name
from hosfl.runs.attendance import write_attendance
from hosfl.runs.checkpoint import load_config
from hosfl.runs.config import Config, all_with_shared, check_device, with_shared
from hosfl.runs.faults import Faults
from hosfl.runs.join import WorkerFactory
from hosfl.runs.memory import HALVES, client_memory, over_bound
from hosfl.runs.report import Evaluation, metric
from hosfl.runs.serve import Transport
from hosfl.runs.simulate import SMALLEST_SHARD, simulate
from hosfl.runs.suggest import suggest
from hosfl.runs.trainer import Progress as OnProgress
from hosfl.runs.trainer import train
from hosfl.settings import DEFAULTS, FIELDS, NEUTRAL, PRESETS
from hosfl.studies.compare import compare, print_table
from hosfl.studies.page import report
from hosfl.studies.run import StudyProgress, run_study
from hosfl.studies.study import load_study
from hosfl.terminal import log_to_terminal

SHOWN = (
    *("accuracy", "loss", "clients", "visits", "states", "empty", "lost", "late", "damaged", "refusals", "complaints"),
    *("differed", "deaths", "void", "seconds", "peak_memory", "digest"),
)


@contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A progress bar that ends with these columns, and a function that prints a line where stderr is no terminal."""
    console = Console(stderr=True)
    plain = not console.is_terminal or console.is_dumb_terminal

    def say(line: str) -> None:
        if plain:
            print(line, file=sys.stderr, flush=True)

    shared = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*shared, *columns, console=console, disable=plain) as bar:
        yield bar, say


@contextmanager
def _bar(title: str, rounds: int) -> Iterator[OnProgress]:
    with _progress(TextColumn("{task.fields[state]}"), TimeRemainingColumn()) as (bar, say):
        task = bar.add_task(title, total=rounds, state="")
        accuracy = ""

        def on_progress(done: int, loss: float, evaluation: Evaluation | None, moved: int) -> None:
            nonlocal accuracy
            if evaluation is not None:
                accuracy = f"{metric(evaluation.scores)} {evaluation.accuracy:.3f}  "
            state = f"loss {loss:.3f}  {accuracy}{moved / 1e6:.1f} MB"
            bar.update(task, completed=done, state=state)
            if evaluation is not None:
                say(f"{title}  {done}/{rounds}  {state}")

        yield on_progress


def _settings(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that the options give, and the others of the preset, some of which a method may not read."""
    given = {name: getattr(options, name) for name in Config.names() if name in options}
    preset = PRESETS.get(options.preset or "", {})
    return given, {name: value for name, value in preset.items() if name not in given}


def _train(options: argparse.Namespace) -> int:
    config, out = _config_and_folder(options, *_settings(options))
    return _run(options, config, out, _engine(options, config))


def _engine(options: argparse.Namespace, config: Config, smallest_shard: int | None = None) -> Transport | None:
    """The transport to clients in other processes; None: they are in this one."""
    if options.engine != "ray":
        for name in ("address", "actors", "actor_gpus"):
            if value := getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} {value} is for --engine ray: add that, or leave it out")
        return None
    made = require("hosfl.engines.ray", "--engine ray", "ray").RayEngine
    # An actor has no GPU but what is set apart for it.
    local = {"device": config.device if options.actor_gpus else "cpu"}
    local |= {name: _absolute(getattr(config, name)) for name in ("data", "model")}

    def engine(files: dict[str, bytes], clients: int) -> Engine:
        everybody = WorkerFactory(files, smallest_shard, **local)
        ray: Engine = made(everybody, clients, options.actors, options.address, gpus=options.actor_gpus)
        return ray

    return Transport(engine, patient=False)  # all clients are here from the start: no others will join


def _absolute(path: str) -> str:
    """The absolute path of a file or folder; anything else, such as a name on the hub, as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def _serve(options: argparse.Namespace) -> int:
    nats = require("hosfl.engines.nats_server", "hosfl serve", "nats")
    federation = require("hosfl.federation", "hosfl serve", "nats")
    member = federation.Member.read(options.server)
    if member.client is not None:
        raise ValueError(f"{options.server} is the folder of {member.who}: name the federation's folder server")
    roster = federation.Roster.read(options.server / "federation.json")
    settings, preset = _settings(options)
    if options.resume is None:
        settings["clients"] = len(roster.clients)
        settings.setdefault("sampled", min(DEFAULTS["sampled"], len(roster.clients)))
    config, out = _config_and_folder(options, settings, preset)
    if out is None:
        raise ValueError("a server keeps its run in a folder: give --out DIR, or --resume DIR")
    if config.clients > len(roster.clients):  # fewer: who was added since has no part in this run
        raise ValueError(
            f"the run in {out} has {config.clients} clients, the federation only {len(roster.clients)}: add the others"
            " by hosfl federation add"
        )
    log_to_terminal(logging.WARNING)
    conf = options.broker or options.server.parent / "broker" / "nats.conf"
    if options.broker is not None or conf.exists():
        federation.check_permissions(conf, roster)
    else:
        logging.warning("the broker's nats.conf is not here to be checked: name a copy of it with --broker FILE")
    try:
        federation.check_broker(member)
    except OSError as error:
        logging.warning("no broker answers at %s (%s): it is waited for", member.address, error)
    engine = nats.NatsEngine(f"tls://{member.address}", member.run, config.clients, member.context())
    try:
        transport = Transport(engine, options.deadline, options.enough, options.least, edge=options.edge)
        transport.check(sum(not client.revoked for client in roster.clients[: config.clients]))
        return _run(options, config, out, transport)
    finally:
        engine.close()


def _config_and_folder(
    options: argparse.Namespace, settings: dict[str, Any], preset: dict[str, Any]
) -> tuple[Config, Path | None]:
    """The settings and the folder of the run that the options name, new or resumed."""
    if options.resume is None:
        return Config(**with_shared(settings, preset)), options.out
    given = [*(["out"] if options.out is not None else []), *(["preset"] if preset else []), *settings]
    if wrong := [name for name in given if name not in NEUTRAL]:
        left_out, others = (", ".join("--" + name.replace("_", "-") for name in names) for names in (wrong, NEUTRAL))
        raise ValueError(
            f"a run that is resumed keeps its own settings: leave out {left_out}; beside --resume there may be {others}"
        )
    return replace(load_config(options.resume), **settings), options.resume


def _run(options: argparse.Namespace, config: Config, out: Path | None, transport: Transport | None) -> int:
    resume = options.resume is not None
    with _bar(short_name(config.method), config.rounds) as on_progress:
        summary = train(config, out, on_progress, resume=resume, transport=transport, tensorboard=options.tensorboard)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary.scores.items())
    print(
        f"{short_name(config.method)}: {config.evaluate_on} {scores}, loss {summary.loss:.4f}"
        f" after {summary.rounds} rounds in {summary.seconds:.1f} s"
    )
    if summary.replicas is not None:
        for client, gave in summary.replicas.odd.items():
            print(f"client {client} gave {gave} in the end, not {summary.replicas.digest}", file=sys.stderr)
        if not summary.replicas.equal:
            print("the clients differ in their bits: this is a bug", file=sys.stderr)
            return 1
        here = summary.replicas.clients - 1  # and a newcomer
        if transport is not None and here and not summary.replicas.odd:
            print(f"clients here at the end: {here}; all hold the server's bits, digest {summary.replicas.digest}")
    if not summary.interrupted:
        return 0
    if out is None:
        print("interrupted; nothing was kept, as there is no --out", file=sys.stderr)
    else:
        print(f"interrupted; to resume: {resume_command(options, out)}", file=sys.stderr)
    return 130


def resume_command(options: argparse.Namespace, out: Path) -> str:
    """The command that resumes the run: its settings are in the folder, the other options only here."""
    words = ["hosfl", options.command, *([str(options.server)] if options.command == "serve" else [])]
    words += ["--resume", str(out)]
    kept = (*FIELDS, "command", "server", "out", "resume", "preset", "default")
    for name, value in vars(options).items():
        if name not in kept and value != options.default(name):
            words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(words)


def _simulate(options: argparse.Namespace) -> int:
    settings, preset = _settings(options)
    config = Config(**preset, **settings)
    faults = Faults(**{f.name: getattr(options, f.name) for f in fields(Faults) if f.name in options})
    with _bar(f"{config.clients} clients", config.rounds) as on_progress:
        outcome = simulate(config, faults, options.out, on_progress, _engine(options, config, SMALLEST_SHARD))
    shown = Table(title=f"{outcome.rounds} rounds of {config.task}", show_header=False)
    for name in SHOWN:
        value = getattr(outcome, name)
        if name == "peak_memory":
            value = ", ".join(f"{where} {size / 1e6:.0f} MB" for where, size in value.items())
        title = metric(outcome.evaluations[-1].scores) if name == "accuracy" else name.replace("_", " ")
        shown.add_row(title, f"{value:.4f}" if isinstance(value, float) else str(value))
    shown.add_row("all clients hold the same bits", "yes" if outcome.equal else "NO")
    Console(width=None if sys.stdout.isatty() else 110).print(shown)
    if not outcome.equal:
        return 1
    if not outcome.interrupted:
        return 0
    print(
        f"interrupted after {outcome.rounds} of {config.rounds} rounds; a simulation cannot be resumed", file=sys.stderr
    )
    return 130


def _split(options: argparse.Namespace) -> int:
    model, inputs = meta_model(options.model, options.batch, options.length)
    try:
        points = cut_points(model, inputs)
    except TypeError as error:
        raise ValueError(str(error)) from None
    except RuntimeError:  # some versions of transformers look at values, which the meta device has not
        points = cut_points(model)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    table = Table(title=f"{type(model).__name__}, {shapes}", caption="parameters, and MB of the outputs of all modules")
    for name in ("at", "first layer of the server", "client", "server", "MB client", "MB server", "MB cut"):
        table.add_column(name, justify="left" if "layer" in name else "right")
    for point in points:
        sizes = (point.client_activations, point.server_activations, point.cut)
        counts = (f"{n:,}" for n in (point.client_parameters, point.server_parameters))
        table.add_row(str(point.at), point.name, *counts, *("?" if n is None else f"{n / 1e6:.2f}" for n in sizes))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def _suggest(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name in FIELDS and name != "rounds"}
    found = suggest(Config(**given), options.rounds, options.passes)
    for reason in found.reasons:
        print(f"- {reason}")
    pairs = [("--option", f"{name}={value}") for name, value in given.pop("options", {}).items()]
    settings = {**given, **found.settings, "rounds": options.rounds}
    pairs += [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    print(shlex.join(["hosfl", "train", *(word for pair in pairs for word in pair)]))
    return 0


def _compare(options: argparse.Namespace) -> int:
    shared, preset = _settings(options)
    runs = [{"method": m, "seed": s} for m in options.methods for s in options.seeds]
    configs = [Config(**with_shared(settings, preset)) for settings in all_with_shared(runs, shared)]
    table = compare(configs, options.out, lambda c: _bar(f"{short_name(c.method)} {c.seed}", c.rounds))
    if table["methods"]:
        print_table(table)
    if not table["interrupted"]:
        return 0
    done = sum(len(line["seeds"]) for line in table["methods"].values())
    again = f"a comparison cannot be resumed: delete {options.out}, or give another --out"
    print(f"interrupted after {done} of {len(configs)} runs; {again}", file=sys.stderr)
    return 130


class _TimeLeft(ProgressColumn):
    """The seconds that a study still expects to need."""

    def render(self, task: Task) -> Text:
        expected, since = task.fields["expected"], task.fields["since"]
        return Text(_time_left(None if expected is None else expected - (time.monotonic() - since)))


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "time left unknown"
    return f"{seconds / 60:.0f} min left" if seconds >= 60 else "under a minute left"


def _study(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    study = load_study(options.file)
    require("matplotlib.figure", "a study's page")  # known now, not after the last run
    with _progress(TextColumn("runs"), _TimeLeft()) as (bar, say):
        task = bar.add_task("study", total=None, expected=None, since=time.monotonic())

        def on_progress(state: StudyProgress) -> None:
            bar.update(task, description=state.phase, completed=state.done, total=state.runs)
            bar.update(task, expected=state.seconds_left, since=time.monotonic())
            if state.last_result:
                say(f"{state.phase}  {state.done}/{state.runs}  {state.last_result}  {_time_left(state.seconds_left)}")

        finished = run_study(study, options.out, options.jobs, on_progress)
    if not finished:
        print(f"interrupted; to resume, run the same command again: {options.out} has what is done", file=sys.stderr)
        return 130
    print(f"{options.out / 'table.json'}, {report(options.out)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    folder = options.folder
    if not (folder / "study.yaml").exists() and not (folder / "events.jsonl").exists():
        raise FileNotFoundError(
            f"{folder} holds no study and no run with clients elsewhere: there is neither study.yaml nor events.jsonl"
        )
    print(report(folder) if (folder / "study.yaml").exists() else write_attendance(folder))
    return 0


def _memory(options: argparse.Namespace) -> int:
    for half in options.halves:
        if half not in HALVES:
            raise ValueError(f"--halves: one of {', '.join(HALVES)} is needed, got {half!r}")
    check_device(options.device)
    with Console(stderr=True).status("memory") as status:
        result = client_memory(
            options.halves or list(HALVES), options.device, lambda what: status.update(f"memory of {what}")
        )
    shown = Table(caption="MB above the weights: a round of one client, alone in its process")
    for name in ("half", "way", "peak", "cut", "of inference + 3 cuts"):
        shown.add_column(name, justify="left" if name in ("half", "way") else "right")
    for name, half in result["halves"].items():
        for way, row in half["ways"].items():
            sizes = (f"{row[k] / 1e6:.2f}" for k in ("peak_extra", "cut"))
            shown.add_row(name, way, *sizes, f"{row['of_bound']:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(shown)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
    over = list(over_bound(result))
    for what in over:
        print(what, file=sys.stderr)
    return 1 if over else 0


COMMANDS = {
    "train": _train,
    "compare": _compare,
    "simulate": _simulate,
    "split": _split,
    "serve": _serve,
    "suggest": _suggest,
    "study": _study,
    "report": _report,
    "memory": _memory,
}
