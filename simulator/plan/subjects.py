"""The kinds of planned models: unmarked, marked, stolen, washed by a removal, and hidden behind an evasion.

Every planned model is a :class:`Subject`: how it is made (its class and the class's fields), the model that it is made
from (its parent), and a seed. Example::

    Trained  benign-1f…                  the task without a watermark
    ├── Stolen  4b96…                    a control: stolen from the unmarked model
    │   └── Removed  9c0d…               the same removal, as the removal's control
    └── Marked  deeptracer-3cfc…         the victim
        └── Stolen  77aa…                a theft
            ├── Removed  e1f2…           a removal of the stolen copy
            └── Guarded  c03a…           the stolen copy behind an evasion

An id is a hash of all that decides the model, its parent's id included. So the same work has the same id in every run,
and also the same randomness, which derives from the id.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from simulator.component import BENIGN
from simulator.data.dataset import DataConfig
from simulator.data.pool import PoolSpec
from simulator.evasions.base import Evasion
from simulator.ownership.key_filter import KeyFilter
from simulator.plan.config import StageConfig
from simulator.removals.base import Removal
from simulator.service.ledger import Terms, hash_token
from simulator.training.recipe import Recipe
from simulator.watermarks.base import Watermark

#: images of a removal's pool if it is a mixture or drawn; a pool of one data set has all its images
POOL = 10_000


Role = Literal["benign", "victim", "stolen", "removed", "guarded"]


def short_hash(*parts: object) -> str:
    """Twelve hex digits of SHA-256 over the canonical JSON of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Subject(ABC):
    """A planned model."""

    @property
    @abstractmethod
    def id(self) -> str:
        """A hash of all that decides the model."""

    @property
    @abstractmethod
    def parent(self) -> Subject | None:
        """The model that this one is made from; None for one that is trained from nothing."""

    @property
    @abstractmethod
    def role(self) -> Role:
        """Its role in the rows."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in progress lines."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Its architecture's name."""

    @property
    def file(self) -> str:
        """The name of its files in a run directory. Thefts and removals get a prefix, e.g. ``stolen-77aa…``, because
        their ids are bare hashes."""
        kept = self.kept
        return kept.id if kept.role in ("benign", "victim") else f"{kept.role}-{kept.id}"

    @property
    def kept(self) -> Subject:
        """The model whose weights it has: itself, or for a suspect behind an evasion the model there."""
        return self

    @property
    def lineage(self) -> Iterator[Subject]:
        """This model, its parent, its parent's parent and so on."""
        found: Subject | None = self
        while found is not None:
            yield found
            found = found.parent

    @property
    def seed(self) -> int:
        """The seed of the root. All models that come from it share this seed."""
        *_, root = self.lineage
        assert isinstance(root, Trained)
        return root.own_seed

    @property
    def owner(self) -> OwnerModel:
        """The owner's model that this one goes back to, e.g. the victim that it was stolen from. An owner's model has
        itself."""
        return next(each for each in self.lineage if isinstance(each, Trained | Marked))

    @property
    def theft(self) -> Stolen | None:
        """The theft that this model goes back to. None for the owner's models and their direct removals."""
        return next((each for each in self.lineage if isinstance(each, Stolen)), None)

    @property
    def control(self) -> bool:
        """Whether it goes back to an unmarked model."""
        return isinstance(self.owner, Trained)


@dataclass(frozen=True)
class Trained(Subject):
    """A model without a watermark, trained by the owner's recipe: the benign model of a seed."""

    dataset: DataConfig
    own_architecture: str
    training: Recipe
    own_seed: int

    def settings(self) -> list[Any]:
        """All that decides the weights, as plain data."""
        plain = [self.dataset.model_dump(mode="json"), self.own_architecture, self.training.model_dump(mode="json")]
        return [*plain, self.own_seed]

    @cached_property
    def training_id(self) -> str:
        """A hash of what decides the weights."""
        return short_hash(*self.settings(), None)

    @cached_property
    def id(self) -> str:
        """See :attr:`Subject.id`."""
        return f"{BENIGN}-{self.training_id}"

    @property
    def parent(self) -> None:
        """None: it is trained from nothing."""
        return None

    @property
    def role(self) -> Role:
        """See :attr:`Subject.role`."""
        return "benign"

    @property
    def label(self) -> str:
        """See :attr:`Subject.label`."""
        return f"train {BENIGN} (seed {self.seed})"

    @property
    def architecture(self) -> str:
        """See :attr:`Subject.architecture`."""
        return self.own_architecture

    @property
    def benign(self) -> Trained:
        """Itself."""
        return self


@dataclass(frozen=True)
class Marked(Subject):
    """A victim: a model trained with a watermark, and a key chosen by the filter. Both choices use ``benign``."""

    benign: Trained
    watermark: Watermark
    key_filter: KeyFilter

    @property
    def dataset(self) -> DataConfig:
        """The victim's task."""
        return self.benign.dataset

    @property
    def training(self) -> Recipe:
        """The owner's recipe."""
        return self.benign.training

    @cached_property
    def training_id(self) -> str:
        """A hash of all that decides the weights. The filter does not."""
        return short_hash(*self.benign.settings(), self.watermark.model_dump(mode="json"))

    @cached_property
    def id(self) -> str:
        """A hash of what decides the weights and the key."""
        return f"{self.watermark.name}-{short_hash(self.training_id, self.key_filter.model_dump(mode='json'))}"

    @property
    def parent(self) -> Trained:
        """The benign model: DeepTracer chooses its classes by it, and the filter chooses the key's samples by it."""
        return self.benign

    @property
    def role(self) -> Role:
        """See :attr:`Subject.role`."""
        return "victim"

    @property
    def label(self) -> str:
        """See :attr:`Subject.label`."""
        return f"train {self.watermark.name} (seed {self.seed})"

    @property
    def architecture(self) -> str:
        """See :attr:`Subject.architecture`."""
        return self.benign.architecture


OwnerModel = Trained | Marked


@dataclass(frozen=True)
class Stolen(Subject):
    """A stolen copy: a theft from ``victim`` in one or several stages, each from the copy of the stage before.

    Several stages are one subject, not a chain of subjects, because they have one account and one seed.

    Attributes:
        victim: the model that answers the first stage.
        triggers_of: the victim whose triggers lie in the pools; None if no pool asks for triggers.
    """

    victim: OwnerModel
    stages: tuple[StageConfig, ...]
    triggers_of: Marked | None = None

    @property
    def parent(self) -> OwnerModel:
        """The victim."""
        return self.victim

    @property
    def role(self) -> Role:
        """See :attr:`Subject.role`."""
        return "stolen"

    @property
    def architecture(self) -> str:
        """See :attr:`Subject.architecture`; the last stage's."""
        return self.stages[-1].architecture or self.victim.architecture

    @property
    def budget(self) -> int:
        """The most victim queries, in images: the first stage's budget."""
        return self.stages[0].budget

    @property
    def attack(self) -> str:
        """Its attacks as in a row, e.g. ``knockoff+knockoff``."""
        return "+".join(stage.attack.name for stage in self.stages)

    @property
    def work(self) -> int:
        """A rough count of the images it trains on. It decides which theft starts first, and nothing else."""
        recipes = [getattr(stage.attack, "training", None) for stage in self.stages]
        epochs = [recipe.epochs if isinstance(recipe, Recipe) else 1 for recipe in recipes]
        return sum(stage.budget * count for stage, count in zip(self.stages, epochs, strict=True))

    @property
    def label(self) -> str:
        """See :attr:`Subject.label`."""
        victim = self.victim.watermark.name if isinstance(self.victim, Marked) else BENIGN
        return f"{self.attack} {self.stages[0].labels} {self.stages[0].pool_label} from {victim} (seed {self.seed})"

    @property
    def accounts(self) -> dict[str, int]:
        """The budget, in images, of each of its accounts with the victim. A lone attacker has one
        account, named by the theft's id; each of the colluding ones has its own."""
        count = self.stages[0].accounts
        if count == 1:
            return {self.id: self.budget}
        shares = [self.budget // count + (i < self.budget % count) for i in range(count)]
        return {f"{self.id}.{i}": share for i, share in enumerate(shares)}

    def terms(self, account: str, token: str) -> Terms:
        """The terms on which one of its accounts is opened."""
        return Terms(self.victim.id, self.stages[0].labels, self.accounts[account], hash_token(token))

    @cached_property
    def id(self) -> str:
        """See :attr:`Subject.id`. No architecture and the victim's architecture by name give the same id."""
        own = {"architecture": None}
        stages = [
            stage.model_dump(mode="json") | (own if stage.architecture == self.victim.architecture else {})
            for stage in self.stages
        ]
        triggers = self.triggers_of.id if self.triggers_of else None
        return short_hash(self.victim.id, stages, triggers)


@dataclass(frozen=True)
class Removed(Subject):
    """A model after a removal: a stolen copy or the owner's own model, washed by a thief who has it.

    Attributes:
        target: the model that is washed.
        pool: the images that the thief uses; None for a removal that needs none.
    """

    target: Subject
    removal: Removal
    pool: PoolSpec | None

    @property
    def parent(self) -> Subject:
        """The model that is washed."""
        return self.target

    @property
    def role(self) -> Role:
        """See :attr:`Subject.role`."""
        return "removed"

    @property
    def architecture(self) -> str:
        """See :attr:`Subject.architecture`."""
        return self.removal.makes(self.target.architecture)

    @property
    def theft_accounts(self) -> tuple[str, ...]:
        """The accounts of the theft that it goes back to, in order; none without a theft."""
        return tuple(self.theft.accounts) if self.theft else ()

    @property
    def chain(self) -> tuple[Removed, ...]:
        """The removals that made it, in order."""
        return tuple(reversed([each for each in self.lineage if isinstance(each, Removed)]))

    @property
    def label(self) -> str:
        """See :attr:`Subject.label`."""
        return f"{self.removal.name} of {self.target.label}"

    @cached_property
    def id(self) -> str:
        """See :attr:`Subject.id`."""
        pool = self.pool.model_dump(mode="json") if self.pool else None
        return short_hash(self.target.id, "remove", self.removal.model_dump(mode="json"), pool)


@dataclass(frozen=True)
class Guarded(Subject):
    """A suspect: a model behind an evasion. It makes no new weights; whoever asks the model asks it through the
    evasion.

    Attributes:
        target: the model behind it.
        pool: the images that the suspect has for it; None for an evasion that needs none.
    """

    target: Subject
    evasion: Evasion
    pool: PoolSpec | None

    @property
    def parent(self) -> Subject:
        """The model behind the evasion."""
        return self.target

    @property
    def kept(self) -> Subject:
        """See :attr:`Subject.kept`."""
        return self.target.kept

    @property
    def role(self) -> Role:
        """See :attr:`Subject.role`."""
        return "guarded"

    @property
    def architecture(self) -> str:
        """See :attr:`Subject.architecture`."""
        return self.target.architecture

    @property
    def label(self) -> str:
        """See :attr:`Subject.label`."""
        return f"{self.evasion.name} before {self.target.label}"

    @cached_property
    def id(self) -> str:
        """See :attr:`Subject.id`."""
        pool = self.pool.model_dump(mode="json") if self.pool else None
        return short_hash(self.target.id, "guard", self.evasion.model_dump(mode="json"), pool)


#: what a thief has in the end
Suspect = Stolen | Removed | Guarded
