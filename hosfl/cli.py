"""The command line: `hosfl train` runs one method once, `hosfl compare` runs methods and seeds into one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hosfl.compare import compare, print_table
from hosfl.config import METHODS, RULES, SCHEDULES, TASKS, Config
from hosfl.lattice import LatticeError
from hosfl.report import Evaluation
from hosfl.trainer import Progress as OnProgress
from hosfl.trainer import train

HELP = {
    "task": "what is learnt: real handwritten digits (default: %(default)s)",
    "method": "HO-SFL, exact gradients, or a client half that never learns (default: %(default)s)",
    "rounds": "rounds (default: %(default)s)",
    "clients": "clients, each with its own data (default: %(default)s)",
    "sampled": "clients that take part in a round (default: %(default)s)",
    "directions": "P, perturbed forward passes per client and round (default: %(default)s)",
    "dist": "of the directions (default: %(default)s)",
    "mu": "size of a probe's step (default: %(default)s)",
    "batch": "samples per client and round, or all it has if fewer (default: %(default)s)",
    "server_rate": "the server's learning rate (default: tuned for task and method)",
    "client_rate": "the clients' learning rate (default: tuned for task and method)",
    "rule": "the client half's: SGD, or with the rate over the gradient's running length (default: %(default)s)",
    "schedule": "of both rates; linear falls to zero at the last round (default: %(default)s)",
    "alpha": "Dirichlet parameter of the clients' data: small is unlike (default: %(default)s)",
    "seed": "of everything (default: %(default)s)",
    "evaluate_every": "rounds between evaluations (default: %(default)s)",
    "evaluate_on": "validation is for choosing rates (default: %(default)s)",
    "device": "where to compute, such as cpu or cuda (default: %(default)s)",
}
CHOICES = {
    "task": TASKS,
    "method": METHODS,
    "rule": RULES,
    "schedule": SCHEDULES,
    "dist": ("rademacher", "gaussian"),
    "evaluate_on": ("test", "validation"),
}
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hosfl", description="Fine-tune split models without backpropagation on clients."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("train", help="run one method once", description="Run one method once.")
    _add_config(one)
    one.add_argument("--out", type=Path, metavar="DIR", help="write metrics, summary, curves and weights there")
    many = commands.add_parser(
        "compare", help="run methods and seeds into one table", description="Run methods and seeds into one table."
    )
    _add_config(many, leave_out=("method", "seed"))
    many.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    many.add_argument("--out", type=Path, metavar="DIR", required=True, help="a folder per run, table and curves")
    return top


@contextmanager
def _bar(title: str, rounds: int) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=rounds, state="")
        accuracy = ""

        def on_progress(done: int, loss: float, evaluation: Evaluation | None, moved: int) -> None:
            nonlocal accuracy
            if evaluation is not None:
                accuracy = f"accuracy {evaluation.accuracy:.3f}  "
            bar.update(task, completed=done, state=f"loss {loss:.3f}  {accuracy}{moved / 1e6:.1f} MB")

        yield on_progress


def _train(options: argparse.Namespace) -> int:
    config = Config(**{name: getattr(options, name) for name in Config.names()})
    with _bar(config.method, config.rounds) as on_progress:
        summary = train(config, options.out, on_progress)
    print(
        f"{config.method}: {config.evaluate_on} accuracy {summary.accuracy:.4f}, loss {summary.loss:.4f}"
        f" after {summary.rounds} rounds in {summary.seconds:.1f} s"
    )
    if summary.replicas is not None and not summary.replicas.equal:
        print("the clients differ in their bits: this is a bug", file=sys.stderr)
        return 1
    return 130 if summary.interrupted else 0


def _compare(options: argparse.Namespace) -> int:
    shared = {n: getattr(options, n) for n in Config.names() if n not in ("method", "seed")}
    configs = [Config(**shared, method=m, seed=s) for m in options.methods for s in options.seeds]
    table = compare(configs, options.out, lambda c: _bar(f"{c.method} {c.seed}", c.rounds))
    print_table(table)
    return 130 if table["interrupted"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    try:
        return (_train if options.command == "train" else _compare)(options)
    except (ValueError, FileExistsError) as error:
        top.error(str(error))
    except LatticeError as error:
        print(f"hosfl: the run diverged: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
