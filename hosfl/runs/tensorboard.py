"""A run's scalars by round, as TensorBoard's event files in the folder `tensorboard` of the run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosfl.extras import require

if TYPE_CHECKING:
    from hosfl.runs.federation import Federation
    from hosfl.runs.report import Evaluation


def summary_writer() -> Any:
    """Return the class that writes event files. Raises ImportError if the package is missing."""
    return require("torch.utils.tensorboard", "--tensorboard", "tensorboard").SummaryWriter


class TensorBoardWriter:
    """Writes a run's scalars. Their step is the number of rounds done.

    evaluation/NAME  the loss and every score of the task, per evaluation
    training/loss    of a round; NaN if nobody took part
    bytes            so far, all clients
    clients/...      took_part, did_not_answer: their numbers in the round
    messages/refused in the round
    seconds/PHASE    of the round: cuts, server, answers

    first: the first step to write. TensorBoard drops this step and later ones from older event files, so that a resumed
    run has every round once.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.refusals = folder / "tensorboard", 0
        before = set(self.folder.glob("*"))
        self.writer = summary_writer()(str(self.folder), purge_step=first)
        self.created = set(self.folder.glob("*")) - before

    def round(self, federation: Federation, done: int, loss: float) -> None:
        """Write a round's scalars."""
        refused = federation.server.refused.total - self.refusals
        self.refusals = federation.server.refused.total
        counts = {
            "training/loss": loss,
            "bytes": sum(federation.messenger.wire.bytes.values()),
            "clients/took_part": len(federation.took_part),
            "clients/did_not_answer": len(federation.messenger.failures),
            "messages/refused": refused,
        }
        self._write(counts | {f"seconds/{phase}": seconds for phase, seconds in federation.seconds.items()}, done)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation's scalars."""
        values = {"loss": evaluation.loss, **evaluation.scores}
        self._write({f"evaluation/{name}": value for name, value in values.items()}, evaluation.round)

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # at once: a run resumed from a following snapshot does not write earlier rounds again

    def clear(self) -> None:
        """Remove the event files that this writer has made, and the folder if it holds nothing else."""
        self.close()
        for path in self.created:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        self.writer.close()
