"""The command line: train, compare methods and seeds, run and report studies, measure a client's memory, simulate a
crowd under faults, list where a model can be cut, rebuild weights from a log, look into a log."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
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
from safetensors import SafetensorError
from safetensors.torch import save

from hosfl.extras import needed
from hosfl.halves.families import skeleton
from hosfl.halves.split import cut_points
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.log import EpochRecord, Log, LogError, RoundRecord
from hosfl.runs.checkpoint import load_config, rebuild, write_atomically, write_json
from hosfl.runs.config import CHOICES, METHODS, NEUTRAL, PRESETS, Config, all_with_shared, with_shared
from hosfl.runs.memory import HALVES, client_memory, over_bound
from hosfl.runs.report import Evaluation, metric
from hosfl.runs.simulate import LIES, Faults, simulate
from hosfl.runs.trainer import Diverged, train
from hosfl.runs.trainer import Progress as OnProgress
from hosfl.studies.compare import compare, print_table
from hosfl.studies.page import report
from hosfl.studies.study import State, load_study, run_study

HELP = {
    "task": "what is learnt: real handwritten digits; the same inverted, by a network pretrained on them; CIFAR, by a"
    " pretrained residual network; or, by a pretrained language model, classes of sentences, SST-2, RTE, WSC, SQuAD"
    " (default: %(default)s)",
    "data": "a folder with the task's data as published, of squad also one file; default: embedded, or by name from the"
    " Hugging Face hub",
    "model": "a pretrained model, on the hub or a folder, where the task does not say (default: the task's own)",
    "at": "the layer to cut the model before, by number or name (default: the task's own)",
    "trains": "what of the client half moves: all, lora, lora:RANK, lora:RANK:LAYERS, biases, norms, or patterns of"
    " names (default: %(default)s)",
    "frozen": "how weights of the client half that do not move are stored; float32: as they are (default: %(default)s)",
    "method": "HO-SFL; exact gradients; a client half that never learns; exact gradients with activations made twice;"
    " SplitFed; zeroth order on both halves; HOSL; MU-SplitFed (default: %(default)s)",
    "rounds": "rounds (default: %(default)s)",
    "clients": "clients, each with its own data (default: %(default)s)",
    "sampled": "clients that take part in a round (default: %(default)s)",
    "local_steps": "steps of a SplitFed client between averages, of MU-SplitFed's server per round"
    " (default: %(default)s)",
    "directions": "P, perturbed forward passes per client and round; with the estimator backward any number"
    " (default: %(default)s)",
    "directions_from": "new directions every round, or a pool measured in turn (default: %(default)s)",
    "pool_size": "D, directions in the pool (default: %(default)s)",
    "pool_rounds": "rounds until the pool is replaced; 0: never (default: %(default)s)",
    "direction_scale": "of directions on a tensor: one, or its relative size (default: %(default)s)",
    "dist": "of the directions (default: %(default)s)",
    "mu": "size of a probe's step (default: %(default)s)",
    "estimator": "of directional derivatives: differences, forward mode, or one backward pass (default: %(default)s)",
    "microbatch": "samples that a backward pass takes together, 0: all (default: %(default)s)",
    "batch": "samples per client and round, or all it has if fewer (default: %(default)s)",
    "server_rate": "the server's learning rate (default: tuned for task and method)",
    "client_rate": "the clients' learning rate (default: tuned for task and method)",
    "server_decay": "weight decay of the server half (default: tuned for task and method)",
    "rule": "the client half's: SGD, with the rate over the gradient's running length, with momentum, or AdamW; with a"
    " pool it acts on the pool's coefficients (default: %(default)s)",
    "schedule": "of both rates; linear falls to zero at the last round (default: %(default)s)",
    "aggregation": "of the clients' answers, and of their gradients of the server half (default: %(default)s)",
    "clip": "the largest length of one client's gradient of the client half, as estimated (default: none)",
    "server_clip": "the largest length of one client's gradient of the server half (default: none)",
    "dtype": "of the client half (default: %(default)s)",
    "partition": "of the data over the clients: for each class, in squad for each article, by shares from a Dirichlet"
    " distribution; or at random in equal parts (default: %(default)s)",
    "alpha": "Dirichlet parameter of the clients' data: small is unlike (default: %(default)s)",
    "seed": "of everything (default: %(default)s)",
    "evaluate_every": "rounds between evaluations (default: %(default)s)",
    "digest_every": "rounds between digests, by which clients find out that they differ (default: %(default)s)",
    "snapshot_every": "rounds between snapshots of the server, from which a killed run resumes (default: %(default)s)",
    "keep": "snapshots kept (default: %(default)s)",
    "evaluate_on": "validation is for choosing rates (default: %(default)s)",
    "device": "where to compute, such as cpu or cuda (default: %(default)s)",
}
FAULTS = {
    "dropout": "share of clients that vanish in the middle of a round (default: %(default)s)",
    "absence": "share of invited clients that turn out to be away (default: %(default)s)",
    "longest_absence": "rounds that a client stays away at most (default: %(default)s)",
    "delay": "mean seconds that a message travels; nothing really waits (default: %(default)s)",
    "deadline": "seconds for each of a round's two exchanges (default: %(default)s)",
    "byzantine": "share of clients that lie (default: %(default)s)",
    "lies": f"what they lie about, with commas between: {', '.join(LIES)} (default: %(default)s)",
    "magnitude": "how many times too large liars' scalars and scaled cuts are (default: %(default)s)",
    "damage": "share of messages in which a bit flips (default: %(default)s)",
    "crash_every": "mean rounds between two deaths of the server; 0: never (default: %(default)s)",
}
SHOWN = (
    *("accuracy", "loss", "clients", "visits", "states", "empty", "lost", "late", "damaged", "refusals", "complaints"),
    *("differed", "deaths", "void", "seconds", "peak_memory", "digest"),
)
TYPES = {"str": str, "int": int, "float": float, "float | None": float}


def _add_config(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    for f in fields(Config):
        if f.name not in leave_out:
            parser.add_argument(
                "--" + f.name.replace("_", "-"),
                type=TYPES[str(f.type)],
                default=f.default,
                choices=CHOICES.get(f.name),
                help=HELP[f.name],
            )


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is needed, this one is empty")
    return Path(text)


def parser(preset: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser; a preset changes the defaults, so that options given beside it still count."""
    top = argparse.ArgumentParser(
        prog="hosfl", description="Fine-tune split models without backpropagation on clients."
    )
    top.add_argument("--version", action="version", version=f"hosfl {version('hosfl')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, to: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = to.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        return made

    one = command("train", "run one method once")
    _add_config(one)
    one.add_argument("--out", type=_path, metavar="DIR", help="write log, snapshots, metrics, curves and weights there")
    one.add_argument(
        "--resume", type=_path, metavar="DIR", help="go on with the run in DIR; --data may say where its data lie now"
    )
    many = command("compare", "run methods and seeds into one table")
    _add_config(many, leave_out=("method", "seed"))
    three = list(METHODS[:3])
    many.add_argument("--methods", nargs="+", choices=METHODS, default=three, help="default: " + " ".join(three))
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    many.add_argument("--out", type=_path, metavar="DIR", required=True, help="a folder per run, table and curves")
    crowd = command("simulate", "run HO-SFL with a crowd of clients under faults")
    _add_config(crowd, leave_out=("method",))
    for f in fields(Faults):
        crowd.add_argument(
            "--" + f.name.replace("_", "-"), type=TYPES[str(f.type)], default=f.default, help=FAULTS[f.name]
        )
    crowd.add_argument("--out", type=_path, metavar="DIR", help="write hosfl.log and simulation.json there")
    for sub in (one, many, crowd):
        sub.add_argument("--preset", choices=PRESETS, help="defaults of other options: the paper's setting")
        sub.set_defaults(**PRESETS.get(preset or "", {}))
    cuts = command("split", "list the places where a model can be cut, and what lies on either side")
    cuts.add_argument("--model", required=True, metavar="NAME", help="on the Hugging Face hub, or a folder; no weights")
    cuts.add_argument("--list", action="store_true", help="list the cut points: what this command does anyway")
    cuts.add_argument("--batch", type=int, default=1, help="samples of the example (default: %(default)s)")
    limit = "tokens per sample, the model's limit at most (default: %(default)s)"
    cuts.add_argument("--length", type=int, default=128, help=limit)
    made = command("rebuild", "make the client half of a log")
    made.add_argument("log", type=Path, metavar="LOG", help="a run's hosfl.log")
    made.add_argument("--base", type=Path, required=True, metavar="FILE", help="safetensors with the base weights")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors to write")
    made.add_argument("--upto", type=int, metavar="ROUND", help="rounds to apply (default: all)")
    studied = command("study", "run the methods and seeds of a file at equal tuning; goes on where it was")
    studied.add_argument("file", type=Path, metavar="FILE", help="YAML: what to study, see hosfl/studies/study.py")
    studied.add_argument("--out", type=_path, metavar="DIR", required=True, help="a file per run, table and report")
    cores = os.cpu_count() or 1
    studied.add_argument("--jobs", type=int, default=cores, help="runs at a time (default: %(default)s)")
    page = command("report", "write a study's folder as one HTML page and its figures as PNG")
    page.add_argument("folder", type=_path, metavar="DIR", help="a study's folder")
    peak = command("memory", "measure the peak memory of one client alone, beside inference of its half")
    peak.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES), help="default: all")
    peak.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    peak.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")
    logs = command("log", "look into a log").add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, does in (("show", "print what a log holds"), ("verify", "check every byte of a log")):
        command(name, does, logs).add_argument("log", type=Path, metavar="LOG")
    return top


@contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A bar with these columns at its end, and how to say a line: what a log file gets in place of the bar."""
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
    """The settings that options give, and those that are the preset's, of which a method may not read all."""
    given = {name: getattr(options, name) for name in Config.names() if name in options}
    preset = {name: value for name, value in PRESETS.get(options.preset or "", {}).items() if given[name] == value}
    return {name: value for name, value in given.items() if name not in preset}, preset


def _train(options: argparse.Namespace) -> int:
    config = Config(**with_shared(*_settings(options)))
    out = options.out
    if options.resume is not None:
        if out is not None or config.settings() != Config().settings():
            others = ", ".join("--" + name.replace("_", "-") for name in NEUTRAL)
            raise ValueError(f"a run goes on with its own settings: beside --resume there may be {others}")
        given = {name: getattr(options, name) for name in NEUTRAL if getattr(options, name) != getattr(Config(), name)}
        out, config = options.resume, replace(load_config(options.resume), **given)
    with _bar(config.method, config.rounds) as on_progress:
        summary = train(config, out, on_progress, resume=options.resume is not None)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary.scores.items())
    print(
        f"{config.method}: {config.evaluate_on} {scores}, loss {summary.loss:.4f}"
        f" after {summary.rounds} rounds in {summary.seconds:.1f} s"
    )
    if summary.replicas is not None and not summary.replicas.equal:
        print("the clients differ in their bits: this is a bug", file=sys.stderr)
        return 1
    return 130 if summary.interrupted else 0


def _simulate(options: argparse.Namespace) -> int:
    config = Config(**{n: getattr(options, n) for n in Config.names() if n != "method"})
    faults = Faults(**{f.name: getattr(options, f.name) for f in fields(Faults)})
    with _bar(f"{config.clients} clients", config.rounds) as on_progress:
        outcome = simulate(config, faults, options.out, on_progress)
    shown = Table(title=f"{outcome.rounds} rounds of {config.task}", show_header=False)
    for name in SHOWN:
        value = getattr(outcome, name)
        title = metric(outcome.evaluations[-1].scores) if name == "accuracy" else name.replace("_", " ")
        shown.add_row(title, f"{value:.4f}" if isinstance(value, float) else str(value))
    shown.add_row("all clients hold the same bits", "yes" if outcome.equal else "NO")
    Console(width=None if sys.stdout.isatty() else 110).print(shown)
    if not outcome.equal:
        return 1
    return 130 if outcome.interrupted else 0


def _split(options: argparse.Namespace) -> int:
    model, inputs = skeleton(options.model, options.batch, options.length)
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


def _rebuild(options: argparse.Namespace) -> int:
    tensors, replica = rebuild(options.log, options.base, options.upto)
    write_atomically(options.out, save(tensors))
    print(f"{options.out}: the client half after {replica.applied} rounds, digest {replica.digest().hex()}")
    return 0


def _log(options: argparse.Namespace) -> int:
    log = Log.read(options.log)
    if options.action == "show":
        for record in log.records:
            if isinstance(record, RoundRecord):
                moves = " ".join(f"{c:.6g}" for c in record.coefficients)
                clients = " ".join(map(str, record.participants)) or "nobody"
                if record.quantum is not None:
                    print(f"from round {record.round} on the weights lie on a lattice of quantum {record.quantum:g}")
                print(f"round {record.round} epoch {record.epoch} rate {record.rate:.6g} clients {clients}: {moves}")
            elif isinstance(record, EpochRecord):
                print(f"epoch {record.epoch}: rounds from {record.round} on are void")
            else:
                print(f"digest after {record.round} rounds: {record.sha256.hex()}")
    header, void = log.header, sum(isinstance(r, RoundRecord) for r in log.records) - len(log.rounds)
    weights = sum(math.prod(p.shape) for p in header.parameters)
    print(
        f"{log.path}: {len(log.rounds)} rounds of {header.directions} directions, {void} void; {log.nbytes} bytes for"
        f" {weights} weights in {len(header.parameters)} tensors; running digest {log.digest[:16]}"
    )
    if log.torn:
        print(f"a torn tail of {log.torn} bytes: an append that did not end; the next run cuts it off")
    return 0


def _compare(options: argparse.Namespace) -> int:
    shared, preset = _settings(options)
    runs = [{"method": m, "seed": s} for m in options.methods for s in options.seeds]
    configs = [Config(**with_shared(settings, preset)) for settings in all_with_shared(runs, shared)]
    table = compare(configs, options.out, lambda c: _bar(f"{c.method} {c.seed}", c.rounds))
    print_table(table)
    return 130 if table["interrupted"] else 0


class _TimeLeft(ProgressColumn):
    """What the study expects to need, less what has passed since it said so."""

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
    needed("matplotlib.figure", "a study's page")  # known now, not after the last run
    with _progress(TextColumn("runs"), _TimeLeft()) as (bar, say):
        task = bar.add_task("study", total=None, expected=None, since=time.monotonic())

        def on_progress(state: State) -> None:
            bar.update(task, description=state.phase, completed=state.done, total=state.runs)
            bar.update(task, expected=state.seconds_left, since=time.monotonic())
            if state.ended:
                say(f"{state.phase}  {state.done}/{state.runs}  {state.ended}  {_time_left(state.seconds_left)}")

        finished = run_study(study, options.out, options.jobs, on_progress)
    if not finished:
        print(f"interrupted: the same command goes on where {options.out} is", file=sys.stderr)
        return 130
    print(f"{options.out / 'table.json'}, {report(options.out)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    print(report(options.folder))
    return 0


def _memory(options: argparse.Namespace) -> int:
    with Console(stderr=True).status("memory") as status:
        result = client_memory(options.halves, options.device, lambda what: status.update(f"memory of {what}"))
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
    "rebuild": _rebuild,
    "log": _log,
    "study": _study,
    "report": _report,
    "memory": _memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if getattr(options, "preset", None):
        options = parser(options.preset).parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: print(f"hosfl: {message}", file=sys.stderr)
            status = COMMANDS[options.command](options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # such as `| head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: the process ends
        print("hosfl: interrupted; what came after the last snapshot or result is lost", file=sys.stderr)
        return 130
    except LogError as error:
        print(f"hosfl: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileExistsError, ImportError) as error:
        top.error(str(error))
    except (OSError, SafetensorError) as error:
        print(f"hosfl: {error}", file=sys.stderr)
        return 2
    except (LatticeError, Diverged) as error:
        print(f"hosfl: the run diverged: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
