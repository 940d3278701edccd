"""A method of your own, in one file: clients send the signs of their scalars, a bit each.

    hosfl train --method examples/signs.py:Signs
    hosfl compare --methods ho examples/signs.py:Signs frozen --out runs/signs

With the rule "normalized" the running length of signs is 1, and a step is as long as HO-SFL's.
"""

from dataclasses import dataclass, replace

from hosfl.methods.ho import HO, ZerothOrderClient


@dataclass
class SignClient(ZerothOrderClient):
    """HO-SFL's client, but for what it answers: sign(v_p)."""

    def answer(self, message):
        answer = super().answer(message)
        return replace(answer, scalars=answer.scalars.sign())


class Signs(HO):
    """HO-SFL with signs for scalars, at HO-SFL's rates."""

    kind = SignClient

    @classmethod
    def tuned(cls, settings):
        return ("ho", settings.directions_from, settings.rule)
