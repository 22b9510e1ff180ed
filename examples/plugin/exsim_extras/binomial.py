"""The ownership test asks whether chance explains a suspect's answers, at a level that the owner chooses."""

from typing import ClassVar, Literal

from pydantic import Field

from simulator.context import Context
from simulator.ownership.base import Verdict, top_labels
from simulator.ownership.evidence import Evidence
from simulator.ownership.key import KeySamples
from simulator.ownership.wsr import WatermarkTest, p_value, wilson_interval
from simulator.service.oracle import Oracle


class Binomial(WatermarkTest):
    """Verifies where a model that guesses each key label does as well with a probability below ``level``.

    The p-value is DeepTracer's Eq. 20, ``P(X >= hits)`` for X ~ B(asked, 1 / K). The number of hits that it takes so
    grows with the key, where a threshold on the WSR is the same for every key.

    Example: ``exsim verify copy.safetensors --key key.safetensors --test binomial``.
    """

    paper: ClassVar[str] = "the binomial test"

    name: Literal["binomial"] = "binomial"
    level: float = Field(1e-6, gt=0, lt=1, description="p-value below which the suspect is verified")

    def judge(self, suspect: Oracle, evidence: Evidence, context: Context) -> Verdict:
        """See :class:`~simulator.ownership.base.OwnershipTest`. The whole key is asked at once."""
        self.check(suspect, evidence)
        key = KeySamples.of(evidence)
        asked = len(key)
        hits = int((top_labels(suspect.query(key.images)) == key.labels).sum()) if asked else 0
        low, high = wilson_interval(hits, asked)
        chance = p_value(hits, asked, key.classes)
        return Verdict(chance < self.level, hits / asked if asked else 0.0, low, high, chance, asked, asked)

    def explain(self, found: Verdict, evidence: Evidence, seed: int) -> str:
        """The verdict, the p-value and the level that it is held against."""
        return (
            f"{found.answer}\n{found.statistic:.1%} of {found.asked} key samples: p-value {found.p_value:.3g}, "
            f"level {self.level:g}"
        )
