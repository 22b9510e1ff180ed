"""Fine-tuning: the thief goes on training, all layers or the last, from where they are or afresh.

    ``depth: last``                       FTLL, only the last layer learns
    ``depth: all``                        FTAL, everything learns
    ``depth: last, reinitialise: true``   RTLL, the last layer starts afresh and learns alone
    ``depth: all, reinitialise: true``    RTAL, the last layer starts afresh and everything learns

DeepTracer (Yang et al., AAAI 2026, Fig. 3 and 10) names the four and states neither data, labels, epochs nor rate.
Function-Coupled Watermarks (Wen et al., 2023, Fig. 5 and 10) fine-tunes on 1000 to 2000 images of the task. Both are
settings here: the data and their labels, a share of them, and any recipe; ``training: {loss: …}`` gives the losses of
DeepTracer's Table 13 (f).

With ``epsilon`` (Table 13 e) every batch is replaced by FGSM examples of it, ``clip(x + ε · sign(∂L/∂x), 0, 1)`` with
the cross-entropy L of the label, made from the model as it stands and so anew in every epoch. The paper says neither
whether clean images are mixed in (here none are), nor whether examples are made anew, nor the scale of ε (here [0, 1]).

A frozen body is in evaluation mode, so that its normalisation's statistics stay what they are.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.models import Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled, LastLayer, reinitialise
from simulator.training.fit import fit
from simulator.training.recipe import Objective, recipe_objective
from simulator.training.signed import ascend_loss


class Tuning(Labelled):
    """Trains the model on, all of it or its last layer alone; with ``epochs: 0`` nothing is drawn afresh either."""

    depth: Literal["last", "all"] = "all"
    reinitialise: bool = Field(False, description="draw the last layer afresh first")
    epsilon: float = Field(0.0, ge=0, le=1, description="of FGSM examples in place of the images; 0 makes none")

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        if not self.rounds:
            return model
        images, labels = self.material(model, task, context.generator)
        if self.reinitialise:
            reinitialise(model, context.generator)
        with LastLayer(model) if self.depth == "last" else nullcontext(model) as learner:
            fit(learner, images, labels, self.training, context, objective=self.objective(), epochs=self.rounds)
        return model.eval()

    def objective(self) -> Objective:
        """The recipe's loss, on FGSM examples if there is an ``epsilon``."""
        plain = recipe_objective(self.training)

        def adversarial(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return plain(model, ascend_loss(model, images, labels, self.epsilon), labels)

        return adversarial if self.epsilon else plain


class FineTuning(Tuning):
    """Trains the model on, all of it or its last layer alone, from where it is or with a fresh last layer."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026; Wen et al., 2023"

    name: Literal["fine_tuning"] = "fine_tuning"
