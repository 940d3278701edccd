"""A run's results: metrics.jsonl during the run, summary.json and curves.png at its end."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch

from hosfl.extras import require
from hosfl.files import FolderLock, finite, naming, read_small, write_atomically, write_json
from hosfl.protocol.provenance import Provenance, ProvenanceError
from hosfl.runs.checkpoint import RUN_FILES, check_free, save_config
from hosfl.runs.federation import Replicas
from hosfl.runs.tensorboard import TensorBoardWriter, summary_writer
from hosfl.settings import Settings
from hosfl_kernels import backends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

    from hosfl.methods.client import Client
    from hosfl.runs.federation import Federation


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the model, on the data that `evaluate_on` names.

    Attributes:
        round: the number of rounds done.
        accuracy: the first of the task's scores, whatever it is: F1 for squad.
        scores: all scores, by name.
        loss: the mean loss over these data.
        training_loss: of the last round, the mean over its clients; NaN before the first.
        bytes: sent so far, between the server and all clients.
        moved: the same by category, such as "cut up".
        seconds: of the run so far.
    """

    round: int
    accuracy: float
    loss: float
    training_loss: float
    bytes: int
    moved: dict[str, int]
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, round: int, scores: dict[str, float], loss: float, training: float, moved: dict[str, int], seconds: float
    ) -> Evaluation:
        """Make an evaluation from a task's scores and the bytes by category."""
        first = next(iter(scores.values()))
        return cls(round, first, loss, training, sum(moved.values()), moved, seconds, scores)

    @classmethod
    def read(cls, line: str) -> tuple[Evaluation, str]:
        """Parse a line of metrics.jsonl: (evaluation, its run's mark). Raises ValueError or TypeError."""
        values: dict[str, Any] = dict(json.loads(line))
        run = str(values.pop("run", ""))
        values |= {name: math.nan for name, value in values.items() if value is None}
        return cls(**values), run


@dataclass(frozen=True)
class Summary:
    """A run's outcome.

    Attributes:
        config: the settings.
        accuracy, scores, loss: of the last `Evaluation`.
        rounds: the number of rounds done.
        interrupted: whether Ctrl-C ended the run before its last round.
        failure: why the run ended early by itself, such as by divergence; None: it did not.
        refused: the reasons for which messages were refused, at most 100.
        replicas: whether all clients hold the same bits at the end: `equal`; `digest`, a newcomer's SHA-256; `clients`,
            the number compared, with the newcomer; `odd`, those with another digest. None: nothing was compared.
        provenance: the settings, and digests of data, model and log.
        bytes: sent in the whole run, by category.
        bytes_per_client_round: the same divided by how often clients took part.
        passes: samples that went forward and backward through the halves in the whole run, without evaluations, such as
            "client forward"; a pass in forward mode counts as one.
        passes_per_client_round: the same divided by how often clients took part.
        seconds: of the run.
        forward_seconds, answer_seconds: means over clients and rounds: of the forward pass that makes the cut, and of
            probing (P passes) or backpropagation.
        peak_memory: bytes, of the process ("resident"), and on CUDA of its allocator ("cuda").
        machine: processor and versions.
        lower_is_better: the scores that are better when smaller.
    """

    config: dict[str, Any]
    accuracy: float
    scores: dict[str, float]
    loss: float
    rounds: int
    interrupted: bool
    failure: str | None
    refused: list[str]
    replicas: Replicas | None
    provenance: dict[str, Any]
    bytes: dict[str, int]
    bytes_per_client_round: dict[str, float]
    passes: dict[str, float]
    passes_per_client_round: dict[str, float]
    seconds: float
    forward_seconds: float
    answer_seconds: float
    peak_memory: dict[str, int]
    machine: dict[str, Any]
    lower_is_better: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        *,
        config: Settings,
        rounds: int,
        last: Evaluation,
        clients: Sequence[Client],
        visits: int,
        passes: Mapping[str, float],
        refused: list[str],
        replicas: Replicas | None,
        provenance: Provenance,
        seconds: float,
        failure: str | None,
        lower_is_better: list[str],
    ) -> Summary:
        """Make the summary of a run. last: its last evaluation; visits: how many times a client took part."""
        timed = max(1, sum(c.seconds.rounds for c in clients))
        return cls(
            config=asdict(config),
            accuracy=last.accuracy,
            scores=last.scores,
            loss=last.loss,
            rounds=rounds,
            interrupted=rounds < config.rounds and failure is None,
            failure=failure,
            refused=refused[:100],
            replicas=replicas,
            provenance=asdict(provenance),
            bytes=last.moved,
            bytes_per_client_round={k: v / max(1, visits) for k, v in last.moved.items()},
            passes=dict(passes),
            passes_per_client_round={k: v / max(1, visits) for k, v in passes.items()},
            seconds=seconds,
            forward_seconds=sum(c.seconds.forward for c in clients) / timed,
            answer_seconds=sum(c.seconds.answer for c in clients) / timed,
            peak_memory=peak_memory(),
            machine=machine(),
            lower_is_better=lower_is_better,
        )


def peak_memory() -> dict[str, int]:
    """Return the peak bytes of this process so far ("resident"), and of the CUDA allocator ("cuda") if there is one."""
    peaks = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def processor_name(cpuinfo: str) -> str | None:
    """Return the name of the first processor in a /proc/cpuinfo, if it has one, and the numbers that identify it.

    A virtual machine's name may be only "AMD EPYC", and on Arm there is none.
    """
    lines = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    numbers = [
        f"{label} {fields[key]}"
        for label, key in (
            ("vendor", "vendor_id"),
            ("family", "cpu family"),
            ("model", "model"),
            ("stepping", "stepping"),
            ("implementer", "CPU implementer"),
            ("part", "CPU part"),
        )
        if key in fields
    ]
    return " ".join(filter(None, (fields.get("model name"), f"({', '.join(numbers)})" if numbers else None))) or None


def machine() -> dict[str, Any]:
    """Describe this machine and its versions, for every results file.

    processor: see `processor_name`. instruction_sets: those of the C++ kernels and of torch's. memory: bytes.
    """

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpuinfo = Path("/proc/cpuinfo")
    processor = processor_name(cpuinfo.read_text()) if cpuinfo.exists() else None
    available = backends()
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "instruction_sets": {
            "hosfl": (available["cpp"] or "").partition(" ")[0],
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backends": available,
        **{name: installed(name) for name in ("hosfl", "torch", "triton", "numpy")},
    }


class Writer:
    """Writes a run's results into its folder, which it locks; without a folder it writes nothing.

    A new run calls `claim_folder`, then `start`; a resumed one `resume`, then `reopen_metrics`.

    tensorboard: whether to write TensorBoard's event files too. Raises ImportError if matplotlib or TensorBoard is
    missing.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        if folder is not None:
            require("matplotlib.figure", "a run's folder")  # needed for the curves: fail now, not after the last round
        if tensorboard:
            summary_writer()
        self.folder, self.tensorboard = folder, tensorboard
        self.board: TensorBoardWriter | None = None
        self.metrics: TextIO | None = None
        self.lock: FolderLock | None = None
        self.claimed = False  # whether `clear` may remove the folder's files, since this run has made them
        self.run = ""  # the digest that marks this run's lines in metrics.jsonl

    def claim_folder(self) -> None:
        """Make and lock the folder. Raises FileExistsError if it holds a run, RunFolderError if it is locked."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.folder)
        check_free(self.folder)
        self.claimed = True

    def start(self, config: Settings, provenance: Provenance) -> None:
        """Begin a run in the claimed folder."""
        if self.folder is None:
            return
        self.run = provenance.digest[:16]
        write_json(self.folder / "provenance.json", asdict(provenance))
        save_config(config, self.folder)  # from now on the run can be resumed
        self.metrics = (self.folder / "metrics.jsonl").open("w")
        self._open_board(0)

    def resume(self, config: Settings, provenance: Provenance) -> None:
        """Lock the folder of a run that is resumed.

        Raises ProvenanceError if the run was made of other data, model or settings, RunFolderError if it is locked.
        """
        assert self.folder is not None
        self.lock = FolderLock(self.folder)
        path = self.folder / "provenance.json"
        try:
            saved = json.loads(read_small(path))
        except FileNotFoundError:
            raise ProvenanceError(f"{path} is not there, which says what the run was made of: start it anew") from None
        except (ValueError, RecursionError) as error:
            raise ProvenanceError(f"{path} is damaged: {error}") from None
        provenance.check(saved, path)
        save_config(config, self.folder)
        self.run = provenance.digest[:16]

    def reopen_metrics(self, round: int) -> list[Evaluation]:
        """Open a resumed run's metrics.jsonl to append to. Returns its evaluations up to `round`, and drops later ones.

        Raises ProvenanceError for evaluations of another run.
        """
        if self.folder is None:
            return []
        path = self.folder / "metrics.jsonl"
        evaluations = self.evaluations(round)
        write_atomically(path, "".join(map(self._line, evaluations)).encode())
        self.metrics = path.open("a")
        self._open_board(round + 1)
        return evaluations

    def _open_board(self, first: int) -> None:
        if self.tensorboard and self.folder is not None:
            self.board = TensorBoardWriter(self.folder, first)

    def evaluations(self, round: int) -> list[Evaluation]:
        """Read the evaluations in metrics.jsonl up to `round`, or up to the first damaged line."""
        assert self.folder is not None
        path, evaluations = self.folder / "metrics.jsonl", []
        lines = read_small(path).decode(errors="replace").split("\n") if path.exists() else []
        for line in lines:
            try:
                evaluation, run = Evaluation.read(line)
            except (ValueError, TypeError, RecursionError):
                break
            if run != self.run:
                raise ProvenanceError(f"{path} has evaluations of another run: put its own back, or remove it")
            if evaluation.round > round:
                break
            evaluations.append(evaluation)
        return evaluations

    def _line(self, evaluation: Evaluation) -> str:
        return json.dumps(finite({**asdict(evaluation), "run": self.run}), allow_nan=False) + "\n"

    def add(self, evaluation: Evaluation) -> Evaluation:
        """Write an evaluation, and return it."""
        if self.metrics is not None:
            with naming(self.metrics.name):
                self.metrics.write(self._line(evaluation))
                self.metrics.flush()
                os.fsync(self.metrics.fileno())  # a snapshot that survives a power cut has its evaluations beside it
        if self.board is not None:
            self.board.evaluation(evaluation)
        return evaluation

    def round(self, federation: Federation, done: int, loss: float) -> None:
        """Write a round's scalars for TensorBoard."""
        if self.board is not None:
            self.board.round(federation, done, loss)

    def finish(self, summary: Summary) -> None:
        """Write summary.json and curves.png."""
        if self.metrics is None or self.folder is None:
            return
        title = f"{summary.config['method']} on {summary.config['task']}, seed {summary.config['seed']}"
        evaluations = self.evaluations(summary.rounds)
        plot_curves({summary.config["method"]: [evaluations]}, self.folder / "curves.png", title)
        # Last, so that a folder with a summary has all the other files too.
        write_json(self.folder / "summary.json", asdict(summary))

    def clear(self) -> None:
        """Remove the files of a run that could not start, so that the folder is free again."""
        if self.folder is None or not self.claimed:
            return
        for name in (*RUN_FILES, "provenance.json", "id.json", "base.safetensors", "status.json", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        if self.board is not None:
            self.board.clear()
        with contextlib.suppress(OSError):  # it holds something else, which is not ours
            self.folder.rmdir()

    def close(self) -> None:
        """Close the files, and unlock the folder."""
        for file in (self.board, self.metrics, self.lock):
            if file is not None:
                file.close()


LOWER_IS_BETTER = ("perplexity",)  # for results of earlier versions, which do not record it


def metric(scores: Mapping[str, float]) -> str:
    """Return the name of the first score, which is shown as the accuracy."""
    return next(iter(scores), "accuracy")


def gap_recovered(value: float, frozen: float, first_order: float) -> float | None:
    """Return the share of the gap between the controls that a value recovers.

    It is (value - frozen) / (first_order - frozen): 0 for the frozen client, 1 for the first-order one; None if these
    are equal.
    """
    return (value - frozen) / (first_order - frozen) if first_order != frozen else None


def plot_curves(runs: dict[str, list[Sequence[Evaluation]]], path: Path, title: str) -> None:
    """Plot loss and accuracy by round, a line per method: the mean over seeds, and a band from worst to best."""
    figure: Figure = require("matplotlib.figure", path.name).Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = {}
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for method, seeds in runs.items():
            length = min(len(evaluations) for evaluations in seeds)
            rounds = [e.round for e in seeds[0][:length]]
            values = np.array([[getattr(e, quantity) for e in run[:length]] for run in seeds], dtype=float)  # None: NaN
            (line,) = axis.plot(rounds, values.mean(0))
            lines[method] = line
            if len(seeds) > 1:
                axis.fill_between(rounds, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)
        axis.set_xlabel("rounds")
        axis.set_ylabel(metric(next(iter(runs.values()))[0][0].scores) if quantity == "accuracy" else quantity)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    logarithmic(axes[0])
    name_lines(lines, axes[1].legend(lines.values(), [""] * len(lines), loc="lower right", frameon=False))
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path, 120)


def logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, with labels such as "0.6" instead of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # "" where there is no room for a label

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(Plain())
    axis.yaxis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(2, 0.4)))


def name_lines(names: Iterable[str], legend: Legend) -> None:
    """Label a legend's lines with literal names: "$" begins no formula, and a leading "_" hides no line."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(fill(name, 40))


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, atomically. Characters that no font has are drawn as boxes, without warnings."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from|Matplotlib currently does not support", UserWarning)
        figure.savefig(png, format="png", dpi=dpi)
    write_atomically(path, png.getvalue())
