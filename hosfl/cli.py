"""The command line: options, commands that need no torch, and how errors are shown.

Parsing options needs no torch. Commands that do are in `hosfl.commands`, which is imported when one of them runs.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from hosfl.extras import require
from hosfl.interrupts import uninterrupted
from hosfl.methods import METHODS
from hosfl.references import reference_file
from hosfl.runs.faults import Faults
from hosfl.settings import CONCERNS, PRESETS
from hosfl.tasks import TASKS
from hosfl.terminal import log_to_terminal, printable

TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "float | None": float}
WITH_TORCH = {"task": "", "method": "", "model": "", "device": "cpu"}  # options of hosfl join
WRITING = ("train", "compare", "simulate", "serve", "study")  # commands that write results as they go on
LONGEST_LINE = 2000  # characters of an error
TENSORBOARD = "write the run's scalars for TensorBoard into its folder tensorboard"
NAMES = {"tasks": ", ".join(TASKS), "methods": ", ".join(METHODS)}


def _pair(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE. The value stays text: the task's function knows its type."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"NAME=VALUE is needed, got {text!r}")
    return name, value


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Add(argparse.Action):
    """Adds a pair to the option's dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, value = values
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), name: value})


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from hosfl import __version__

        print(f"hosfl {__version__}")
        parser.exit()


def _add_settings(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), concerns: Sequence[Any] = CONCERNS
) -> None:
    """Add an option for every setting of a run, in a group per concern."""
    for concern in concerns:
        group = parser.add_argument_group(concern.__name__.lower())
        own = [f for f in fields(concern) if f.name not in leave_out]
        _add_fields(group, own)


def _add_fields(group: Any, own: Sequence[Any]) -> None:
    """Add an option for each field. One that is not given is missing in the result, so that presets can supply it."""
    for f in own:
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].format(**NAMES)
        shared: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        if str(f.type).startswith("dict"):
            shared |= {"type": _pair, "action": _Add, "metavar": "NAME=VALUE"}
            flag = flag.removesuffix("s")
        else:
            shared |= {"type": TYPES[str(f.type)], "choices": f.metadata["choices"] or None}
            text += "" if "default:" in text else f" (default: {f.default})"
        group.add_argument(flag, help=text.replace("%", "%%"), **shared)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is needed, this one is empty")
    return Path(text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = _Parser(prog="hosfl", description="Fine-tune split models without backpropagation on clients.")
    top.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, to: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = to.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        return made

    _add_train(command("train", "train a split model by one method, with one seed"))
    _add_serve(command("serve", "train with clients on other machines: the server of a federation"))
    _add_join(command("join", "take part in a federation as one of its clients, until interrupted"))
    status = command("status", "show the state of a federation's run: clients connected, round, loss, bytes, refusals")
    status.add_argument("folder", type=_path, metavar="DIR", help="the run's folder")
    status.add_argument("--watch", action="store_true", help="go on showing it until interrupted")
    _add_compare(command("compare", "train by several methods and seeds, into one table"))
    _add_simulate(command("simulate", "simulate HO-SFL with many clients that drop out, stay away or lie"))
    _add_split(command("split", "list the places where a model can be cut, and what lies on either side"))
    _add_suggest(
        command("suggest", "suggest what to train of the client half, for a number of rounds and forward passes")
    )
    _add_rebuild(command("rebuild", "rebuild the client half from its log and initial weights"))
    _add_study(command("study", "compare the methods of a file, each tuned equally; run again, it resumes"))
    report = command(
        "report", "write a study, or which clients took part in a run, as one HTML page with figures as PNG"
    )
    report.add_argument("folder", type=_path, metavar="DIR", help="of a study, or of a run with clients elsewhere")
    _add_memory(command("memory", "measure the peak memory of one client alone, beside inference of its half"))
    logs = command("log", "print or check a log").add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, does in (("show", "print what a log holds"), ("verify", "check every byte of a log")):
        command(name, does, logs).add_argument("log", type=Path, metavar="LOG")
    _add_federation(command, command("federation", "make and manage the certificates of a run across machines"))
    return top


def _add_train(train: argparse.ArgumentParser) -> None:
    train.usage = "%(prog)s [--out DIR] [OPTION ...]"
    _add_settings(train)
    train.add_argument(
        "--out", type=_path, metavar="DIR", help="write log, snapshots, metrics, curves and weights there"
    )
    train.add_argument(
        "--resume", type=_path, metavar="DIR", help="resume the run in DIR; --data may say where its data are now"
    )
    train.add_argument("--tensorboard", action="store_true", help=TENSORBOARD)
    _add_engine(train)
    _add_preset(train)
    train.set_defaults(default=train.get_default)  # for the command that goes on with an interrupted run


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.usage = "%(prog)s DIR (--out DIR | --resume DIR) [OPTION ...]"
    serve.add_argument(
        "server", type=_path, metavar="DIR", help="the folder `server` that hosfl federation create made"
    )
    _add_settings(serve, leave_out=("clients",))
    serve.add_argument("--out", type=_path, metavar="DIR", help="write log, snapshots, metrics and status there")
    serve.add_argument("--resume", type=_path, metavar="DIR", help="resume the run in DIR")
    serve.add_argument("--tensorboard", action="store_true", help=TENSORBOARD)
    edge = "offer the client half to clients without torch too, which join by hosfl join --runtime onnx"
    serve.add_argument("--edge", action="store_true", help=edge)
    where = "a copy of the broker's nats.conf, to be checked; default: the one beside DIR, if it is there"
    serve.add_argument("--broker", type=Path, metavar="FILE", help=where)
    waits = serve.add_argument_group("waiting")
    waits.add_argument("--deadline", type=float, default=60.0, help="seconds for each of a round's two exchanges (60)")
    waits.add_argument("--enough", type=int, help="answers after which a round goes on without the rest; default: all")
    waits.add_argument("--least", type=int, default=1, help="clients to be connected before a round begins (1)")
    _add_preset(serve)
    serve.set_defaults(default=serve.get_default)  # for the command that goes on with an interrupted run


def _add_join(join: argparse.ArgumentParser) -> None:
    join.add_argument(
        "client", type=_path, metavar="DIR", help="the client's folder, which the federation's operator hands out"
    )
    own = "this client's data: arrays (.npz, .safetensors), FILE.py:FUNCTION, or a file or folder as the task reads it;"
    join.add_argument("--data", default="", help=f"{own} default: its share of the task's own")
    join.add_argument("--task", default="", help="FILE.py:FUNCTION of yours, where the run's task is not the library's")
    join.add_argument(
        "--method", default="", help="FILE.py:CLASS of yours, where the run's method is not the library's"
    )
    join.add_argument("--model", default="", help="a folder or name, where the run has a model of its own")
    join.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    kinds = "what runs the client half: torch, or onnx, onnxruntime without torch (default: %(default)s)"
    join.add_argument("--runtime", choices=("torch", "onnx"), default="torch", help=kinds)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.usage = "%(prog)s --out DIR [OPTION ...]"
    _add_settings(compare, leave_out=("method", "seed"))
    three = list(METHODS)[:3]
    methods = f"{', '.join(METHODS)}, or FILE.py:CLASS (default: {' '.join(three)})"
    compare.add_argument("--methods", nargs="+", default=three, metavar="METHOD", help=methods)
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    compare.add_argument("--out", type=_path, metavar="DIR", required=True, help="a folder per run, table and curves")
    _add_preset(compare)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    simulate.usage = "%(prog)s [--out DIR] [OPTION ...]"
    _add_settings(simulate, leave_out=("method",))
    _add_fields(simulate.add_argument_group("faults"), fields(Faults))
    _add_engine(simulate)
    simulate.add_argument("--out", type=_path, metavar="DIR", help="write hosfl.log and simulation.json there")
    _add_preset(simulate)


def _add_split(split: argparse.ArgumentParser) -> None:
    split.add_argument(
        "--model", required=True, metavar="NAME", help="on the Hugging Face hub, or a folder; no weights"
    )
    split.add_argument("--list", action="store_true", help="list the cut points, as without this option")
    split.add_argument("--batch", type=_count, default=1, help="samples of the example (default: %(default)s)")
    limit = "tokens per sample, the model's limit at most (default: %(default)s)"
    split.add_argument("--length", type=_count, default=128, help=limit)


def _add_suggest(suggest: argparse.ArgumentParser) -> None:
    suggest.usage = "%(prog)s [OPTION ...]"
    _add_settings(suggest, leave_out=("trains",), concerns=CONCERNS[:2])
    suggest.add_argument("--rounds", type=int, default=300, help="of the run to come (default: %(default)s)")
    work = "what a client may spend on probes in a round, in forward passes of its half (default: %(default)s)"
    suggest.add_argument("--passes", type=float, default=5.0, help=work)


def _add_rebuild(rebuild: argparse.ArgumentParser) -> None:
    rebuild.add_argument("log", type=Path, metavar="LOG", help="a run's hosfl.log")
    rebuild.add_argument("--base", type=Path, required=True, metavar="FILE", help="safetensors with the base weights")
    rebuild.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors to write")
    rebuild.add_argument("--upto", type=int, metavar="ROUND", help="rounds to apply (default: all)")


def _add_study(study: argparse.ArgumentParser) -> None:
    study.add_argument("file", type=Path, metavar="FILE", help="YAML: what to study, see docs/studies.md")
    study.add_argument("--out", type=_path, metavar="DIR", required=True, help="a file per run, table and report")
    cores = os.cpu_count() or 1
    study.add_argument("--jobs", type=int, default=cores, help="runs at a time (default: %(default)s)")


def _add_memory(memory: argparse.ArgumentParser) -> None:
    memory.add_argument(
        "--halves", nargs="+", default=[], metavar="HALF", help="digits, minilm, resnet18 (default: all)"
    )
    memory.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    memory.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="other defaults for the options: the paper's setting")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose where clients run."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=("in-process", "ray"),
        default="in-process",
        help="where clients run: in this process, or on a Ray cluster; elsewhere: hosfl serve (default: %(default)s)",
    )
    engine.add_argument("--address", help="a running Ray cluster, HOST:PORT or auto; default: one is started here")
    engine.add_argument(
        "--actors", type=int, help="Ray processes that the clients share; default: as many as have room"
    )
    share = "share of a GPU for each actor, such as 0.25; clients then compute on --device, else on CPUs (default: 0)"
    engine.add_argument("--actor-gpus", type=float, default=0.0, metavar="SHARE", help=share)


def _add_federation(command: Callable[..., argparse.ArgumentParser], parser: argparse.ArgumentParser) -> None:
    """The actions of `hosfl federation`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, does: str) -> argparse.ArgumentParser:
        made = command(name, does, actions)
        made.add_argument("folder", type=_path, metavar="DIR", help="the federation's folder")
        return made

    made = action("create", "make certificates, the broker's configuration, and a folder for each client's owner")
    made.add_argument("--clients", type=int, required=True, help="how many, numbered from 0")
    made.add_argument("--address", required=True, metavar="HOST[:PORT]", help="where clients reach the broker")
    made.add_argument("--name", metavar="RUN", help="of the run (default: the folder's)")
    made.add_argument("--days", type=int, default=365, help="how long certificates last (default: %(default)s)")
    where = "where the folder broker will lie on the broker's machine (default: DIR/broker)"
    made.add_argument("--broker-folder", default="", metavar="PATH", help=where)
    more = action("add", "make folders for more clients")
    more.add_argument("--clients", type=int, default=1, help="how many more (default: %(default)s)")
    action("revoke", "take a client's permissions away").add_argument("client", type=int, metavar="CLIENT")
    new = action("renew", "make a new certificate in place of one that ends, is lost, or was revoked")
    new.add_argument("who", type=_member, metavar="WHO", help="a client's number, server or broker")
    action("show", "print who is in, until when, and who is not any more")


def _member(text: str) -> int | str:
    if text not in ("server", "broker") and not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"a client's number, server or broker is needed, got {text!r}")
    return int(text) if text.isdigit() else text


def _federation(options: argparse.Namespace) -> int:
    status: int = require("hosfl.federation.command", "hosfl federation", "nats").run(options)
    return status


def _join(options: argparse.Namespace) -> int:
    extra = "edge" if options.runtime == "onnx" else "nats"
    nats, federation = (require(name, "hosfl join", extra) for name in ("hosfl.engines.nats_line", "hosfl.federation"))
    from hosfl.engines.engine import EngineError
    from hosfl.engines.signals import StopOnSignal

    member = federation.Member.read(options.client)
    if member.client is None:
        raise ValueError(f"{options.client} is the server's folder: name a client's, such as clients/0")
    settings = {"data": options.data}
    if options.runtime == "onnx":
        with uninterrupted():
            join = require("hosfl.edge.join", "hosfl join --runtime onnx", "edge").join
        for name, default in WITH_TORCH.items():
            if getattr(options, name) != default:
                raise ValueError(f"--{name} is for clients with torch: leave it out, or leave out --runtime onnx")
    else:
        with uninterrupted():
            join = require("hosfl.runs.join", "hosfl join without --runtime onnx", "torch").join
        settings |= {name: getattr(options, name) for name in WITH_TORCH}
    file = reference_file(options.data)
    if file and not options.task and not Path(file).exists():  # a task of the user's own may take anything
        raise ValueError(f"--data: there is no {file}")
    log_to_terminal(logging.INFO)
    with StopOnSignal(f"client {member.client} of run {member.run}") as line:
        try:
            line.line = nats.NatsLine(f"tls://{member.address}", member.run, member.client, member.context())
            join(line, member.client, options.client / "state", **settings)
        except (KeyboardInterrupt, EngineError):
            if line.signal is None:
                raise
        except Exception:
            line.close()  # else it would go on reconnecting while the error is printed
            raise
    return 130 if line.signal == signal.SIGINT else 0


def _rebuild(options: argparse.Namespace) -> int:
    from hosfl.files import write_atomically
    from hosfl.protocol.rebuild import rebuild
    from hosfl.protocol.weights import as_file

    for source in (options.log, options.base):
        if options.out.exists() and options.out.samefile(source):
            raise ValueError(f"{options.out} is what the client half is rebuilt from: write it to another file")
    tensors, replica = rebuild(options.log, options.base, options.upto)
    write_atomically(options.out, as_file(tensors))
    rounds, digest = replica.applied, replica.digest().hex()
    print(f"{options.out}: the client half after {rounds} rounds; digest of its trained weights {digest}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from hosfl.runs.status import show

    return show(options.folder, options.watch)


def _log(options: argparse.Namespace) -> int:
    from hosfl.protocol.log import Log
    from hosfl.protocol.records import EpochRecord, RoundRecord

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


def main(arguments: Sequence[str] | None = None) -> int:
    lost = ""
    try:
        options = _read(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: _print_line(str(message))
            with uninterrupted():  # an interrupted import leaves a half-initialised module
                command = _command(options.command)
            lost = "; what came after the last snapshot or result is lost" * (options.command in WRITING)
            done = command(options)
            sys.stdout.flush()
            return done
    except BrokenPipeError:  # the reader is gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends already
        print(f"hosfl: interrupted{lost}", file=sys.stderr)
        return 130
    except Exception as error:
        status = _report(error)
        if status is None:
            _print_line(_message_of(error))
            sys.exit(2)
        return status


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. An unknown option is reported as the command's error, whose --help lists its options."""
    top = parser()
    try:
        options, unknown = top.parse_known_args(arguments)
    except SystemExit:
        sys.stdout.flush()  # after --help: raises BrokenPipeError here if the reader is gone
        raise
    if unknown:
        top.prog = " ".join(filter(None, (top.prog, options.command, getattr(options, "action", ""))))
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    without_torch = {"rebuild": _rebuild, "log": _log, "status": _status, "federation": _federation, "join": _join}
    command: Callable[[argparse.Namespace], int]
    command = without_torch.get(name) or require("hosfl.commands", f"hosfl {name}", "torch").COMMANDS[name]
    return command


def _report(error: Exception) -> int | None:
    """Print what ended the command and return the exit status; None for an error in the options.

    Raises any other error: it is a bug.
    """
    from safetensors import SafetensorError

    from hosfl.engines.engine import EngineError, JoinError
    from hosfl.protocol.header import LogError
    from hosfl.protocol.lattice import LatticeError
    from hosfl.protocol.terms import Diverged, NothingLearnt

    status: int | None
    match error:
        case LogError() | EngineError() | JoinError() | NothingLearnt():
            status = 1
        case LatticeError() | Diverged():
            _print_line(f"the run diverged: {_message_of(error)}")
            return 1
        case ValueError() | FileExistsError() | ImportError():
            return None
        case TypeError() if type(error) is not TypeError:  # CutError and TaskError, which need torch to be named
            return None
        case OSError() | SafetensorError():
            status = 2
        case MemoryError():
            reason = _message_of(error) or "less of it is needed, or more has to be free"
            _print_line(f"there is not enough memory: {reason}")
            return 1
        case _:
            raise error
    _print_line(_message_of(error))
    return status


def _message_of(error: Exception) -> str:
    """An error's message; of the system's errors the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, FileExistsError):
            return f"{error.filename} is a file, and a folder is needed: name another"
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _print_line(text: str) -> None:
    """Print one printable line to stderr: errors may quote files and servers of others."""
    line = printable(re.sub(r"\s*[\n\r\t]\s*", " ", text.strip()))
    print(f"hosfl: {line[:LONGEST_LINE]}{' ...' * (len(line) > LONGEST_LINE)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
