"""`Config`: the checked settings of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hosfl.methods import METHODS, method_of
from hosfl.settings import DEFAULTS, FIELDS, Settings
from hosfl.tasks import options_of


@dataclass(frozen=True)
class Config(Settings):
    """All settings of one run, checked and frozen: those of `Data`, `Halves`, `Learning` and `Schedule`.

        config = hosfl.Config(task="digits", method="first-order", rounds=200, seed=3)
        hosfl.train(config)

    `hosfl train --help` lists them with their defaults, and, for instance, `help(hosfl.settings.Learning)` explains
    those of one concern. numpy's numbers, and whole numbers for floats, are accepted; nothing else is converted.

    Raises:
        ValueError: a value is invalid; or one that is not the default would not be read by the run.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "options", options_of(self))
        method_of(self.method).check(self)
        for name, reason in ignored(vars(self)).items():
            if getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"{name} = {getattr(self, name)!r} would do nothing {reason}: leave it out")
        check_device(self.device)


def check_device(device: str) -> None:
    """Raises ValueError for a device that cannot compute here."""
    import torch  # not at the top: --help does not need it

    try:
        torch.zeros(1, device=device).item()  # .item() fails on the device "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"cannot compute on device {device!r}: {error}") from error


def ignored(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that a run would not read, each with the reason, such as "with method 'frozen'"."""
    values = {**DEFAULTS, **settings}
    read_by_some = {name for method in METHODS for name in method_of(method).reads}
    unread = read_by_some - set(method_of(values["method"]).reads)
    reasons = {name: f"with method {values['method']!r}" for name in FIELDS if name in unread}
    for name, field in FIELDS.items():
        other, needed = field.metadata["read_with"] or ("", ())
        if other and not {name, other} & unread and values[other] not in needed:
            reasons[name] = f"with {other} {values[other]!r}"
    return reasons


def with_shared(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's own settings, with those shared ones that it reads and does not set itself."""
    unread = ignored({**shared, **own})
    return {**{name: value for name, value in shared.items() if name not in unread}, **own}


def all_with_shared(runs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Call `with_shared` for each run. Raises ValueError for a shared non-default setting that no run reads."""
    unread = [ignored({**shared, **own}) for own in runs]
    for name, value in shared.items():
        reasons = [by_name.get(name) for by_name, own in zip(unread, runs, strict=True) if name not in own]
        if reasons and all(reasons) and value != DEFAULTS[name]:
            reason = " or ".join(dict.fromkeys(map(str, reasons)))
            raise ValueError(f"{name} = {value!r} would do nothing {reason}: leave it out")
    return [with_shared(own, shared) for own in runs]
