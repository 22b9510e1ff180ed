"""Query pools: the unlabelled images an attacker may ask the victim about.

A pool is a mixture of named parts. ``attacker`` and ``owner`` are the victim's own data set: the attacker's split (the
usual assumption) and the owner's training images (the strongest attacker). ``triggers`` are watermark trigger samples,
``patches`` random crops of two photographs (a stand-in for "any natural images" that needs no download), and any other
name is a foreign data set with all its training images, as in Knockoff Nets (Orekondy et al., CVPR 2019, §4).
The test part of the victim's data set is never in a pool. It is none of the parts, and a run that loads a foreign data
set takes the test images out of it with :func:`without_test_images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor

from simulator.component import Settings, describe
from simulator.data.dataset import Dataset, Images, check_name, convert_images
from simulator.data.known_sets import KNOWN
from simulator.data.patches import patches
from simulator.errors import InputError

__all__ = ["Pool", "PoolSpec", "build_pool", "convert_images", "patches", "without_test_images"]


#: the parts that come with the run and are no data sets of their own
OWN_PARTS = ("attacker", "owner", "triggers", "patches")


@dataclass(frozen=True, eq=False)
class Pool:
    """Images, uint8 ``(N, C, H, W)`` as the victim takes them, and int64 ``groups`` ``(N,)``.

    The pool has the images of ``source`` in the order ``order``, int64 ``(N,)``; None keeps the source's order. Other
    processes may share the source, so :meth:`take` copies only the images that are asked for. :attr:`images` is a copy
    of all, made when it is first read.

    A group is what the attacker knows an image to be in its *source*: its class in its own data set (for patches, its
    photograph and scale). Sources do not share groups; the groups are 0..G-1 and each has an image. Adaptive Knockoff
    takes them as its arms.

    ``parents``, int64 ``(G,)``, is the level above the groups: the source of each group, 0..P-1. It is None if the pool
    has a single source.

    ``labels``, int64 ``(N,)``, are the images' true classes of the victim's task. They are None where a part is not of
    the victim's data set. Removals use them; no attack does.
    """

    name: str
    source: Tensor
    groups: Tensor
    parents: Tensor | None = None
    order: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def images(self) -> Tensor:
        """All images, in the pool's order."""
        return self.source if self.order is None else self.source[self.order]

    def take(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 ``(M,)``) of the pool, in that order, as a copy."""
        return self.source[indices if self.order is None else self.order[indices]]


class PoolSpec(Settings):
    """What a pool is made of.

    ``parts`` maps each part to its weight; images are taken in proportion to the weights. ``size`` is the number of
    images. Without it, a pool of one data set has all its images, and any other pool has as many as the query budget.
    ``classes`` restricts ``attacker`` and ``owner`` to some classes of the victim's data set, e.g. to steal a part of
    its function; the other parts keep all classes.
    """

    parts: dict[str, float]
    size: int | None = Field(default=None, ge=1)
    classes: tuple[int, ...] | None = None

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: dict[str, float]) -> dict[str, float]:
        if not parts:
            raise InputError("a pool needs at least one part")
        for name, weight in parts.items():
            check_name(name, also=OWN_PARTS)
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"weight of {name!r} is {weight}, it must be a number above 0")
        # one order, so that two spellings of a pool are the same pool with the same images
        return {name: float(parts[name]) for name in sorted(parts)}

    @field_validator("classes", mode="before")
    @classmethod
    def _tuple(cls, classes: object) -> object:
        return tuple(classes) if isinstance(classes, list) else classes

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if classes is None:
            return None
        if not classes or min(classes) < 0:
            raise InputError(f"{list(classes)} is not a list of at least one class (numbers from 0)")
        return tuple(sorted(set(classes)))

    @model_validator(mode="after")
    def _classes_of_something(self) -> PoolSpec:
        if self.classes is not None and not {"attacker", "owner"} & set(self.parts):
            raise InputError(f"classes restrict the parts attacker and owner, this pool has {', '.join(self.parts)}")
        return self

    def __hash__(self) -> int:
        return hash((tuple(self.parts.items()), self.size, self.classes))

    @classmethod
    def parse(cls, value: object) -> PoolSpec:
        """A spec from YAML: a name, a mapping of weights, or a mapping with ``parts``, ``size`` and ``classes``.

        ``parts`` itself may be a name or a mapping of weights.

        Raises:
            InputError: one line with the wrong name or value and what is allowed.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str | Mapping):
            raise InputError(f"pool: {value!r} is neither a name nor a mapping of names to weights")
        fields = dict(value) if isinstance(value, Mapping) and "parts" in value else {"parts": value}
        parts = fields["parts"]
        fields["parts"] = {parts: 1.0} if isinstance(parts, str) else parts
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(f"pool: {describe(error, cls)}") from None

    @property
    def labelled(self) -> bool:
        """Whether every image is of the victim's data set, and so has a true label of its task."""
        return set(self.parts) <= {"attacker", "owner"}

    @property
    def label(self) -> str:
        """A short name for the rows, such as ``patches``, ``attacker+patches``, ``3*attacker+patches``,
        ``attacker[0,1]`` (classes) and ``patches@500`` (size); a path is shortened to its last part.
        """
        least = min(self.parts.values())
        names = []
        for name, weight in self.parts.items():
            factor = f"{weight / least:.4g}*" if weight != least else ""
            short = name if name in OWN_PARTS or name in KNOWN else Path(name).name or name
            chosen = ""
            if self.classes is not None and name in ("attacker", "owner"):
                chosen = f"[{','.join(map(str, self.classes))}]"
            names.append(f"{factor}{short}{chosen}")
        return "+".join(names) + (f"@{self.size}" if self.size is not None else "")


def build_pool(
    spec: PoolSpec,
    *,
    dataset: Dataset,
    count: int,
    generator: torch.Generator,
    foreign: Callable[[str], Images],
    triggers: Images | None,
) -> Pool:
    """The pool of a spec, in the victim's size and channels, shuffled.

    A pool of one data set and no size has all its images. Any other pool has ``round(n * weight / sum of weights)``
    images of each part, drawn without replacement. Here n is the size (default ``count``), or less if a part has too
    few images for its weight. The victim's test part is not needed: an attacker's view of the data has none.

    Args:
        spec: the parts and their weights.
        dataset: the victim's data set.
        count: how many images the attacker can use at most (its query budget).
        generator: the only source of randomness.
        foreign: gives the images of another data set by its name, without the victim's test images.
        triggers: the trigger samples for the part ``triggers``, labelled.

    Raises:
        InputError: a part has no images, or a class is not one of the data set's.
    """
    sources = _sources(spec, dataset, foreign, triggers)
    counts = _counts(spec, {name: len(images) for name, images in sources.items()}, count)
    images, groups, labels, used = [], [], [], 0
    origins: list[Tensor] = []
    for name, number in counts.items():
        source = sources.get(name)
        if source is None:
            source = patches(number, dataset.channels, dataset.size, generator)
        elif number < len(source):
            source = source.take(torch.randperm(len(source), generator=generator)[:number])
        images.append(convert_images(source.images, dataset.channels, dataset.size))
        groups.append(source.labels + used)
        labels.append(source.labels)
        origins.append(torch.full_like(source.labels, len(origins)))
        used += int(source.labels.max()) + 1 if number else 0
    order = torch.randperm(_total(spec, counts, count), generator=generator)
    dense = torch.unique(torch.cat(groups), return_inverse=True)[1]
    everything = images[0] if len(images) == 1 else torch.cat(images)
    known = torch.cat(labels)[order] if spec.labelled else None
    return Pool(spec.label, everything, dense[order], _parents(dense, torch.cat(origins)), order, known)


def pool_size(
    spec: PoolSpec,
    *,
    dataset: Dataset,
    count: int,
    foreign: Callable[[str], Images],
    triggers: Images | None,
) -> int:
    """The number of images that :func:`build_pool` gives for the same arguments. It makes none.

    Raises:
        InputError: as :func:`build_pool`.
    """
    sources = _sources(spec, dataset, foreign, triggers)
    return _total(spec, _counts(spec, {name: len(images) for name, images in sources.items()}, count), count)


def _total(spec: PoolSpec, counts: Mapping[str, int], count: int) -> int:
    total = sum(counts.values())
    if not total:
        raise InputError(f"pool {spec.label}: no image at all for {count} queries")
    return total


def _sources(
    spec: PoolSpec, dataset: Dataset, foreign: Callable[[str], Images], triggers: Images | None
) -> dict[str, Images]:
    """The images of the parts that are not generated."""
    return {name: _source(name, spec, dataset, foreign, triggers) for name in spec.parts if name != "patches"}


def _parents(groups: Tensor, origins: Tensor) -> Tensor | None:
    """The origin of each group, from the group and the origin of each image; None where all have the same."""
    present, dense = torch.unique(origins, return_inverse=True)
    parents = torch.zeros(int(groups.max()) + 1, dtype=torch.int64)
    parents[groups] = dense
    return parents if len(present) > 1 else None


def _source(
    name: str, spec: PoolSpec, dataset: Dataset, foreign: Callable[[str], Images], triggers: Images | None
) -> Images:
    """The images of a part that is not generated."""
    if name in ("attacker", "owner"):
        images = dataset.attacker if name == "attacker" else dataset.owner
        if spec.classes is None:
            return images
        if spec.classes[-1] >= dataset.classes:
            raise InputError(
                f"pool: class {spec.classes[-1]} is not one of {dataset.name}'s, 0 to {dataset.classes - 1}"
            )
        images = images.subset_of_classes(spec.classes)
        if not len(images):
            raise InputError(f"pool: the {name} part of {dataset.name} has no image of class {list(spec.classes)}")
        return images
    if name == "triggers":
        if triggers is None or not len(triggers):
            raise InputError("pool: there are no trigger samples for the part 'triggers'")
        return triggers
    if _same_set(name, dataset.name):
        raise InputError(f"pool: {name!r} is the victim's own data set: take 'attacker' or 'owner' of it")
    return foreign(name)


def _same_set(name: str, other: str) -> bool:
    if name == other or name in KNOWN or other in KNOWN:
        return name == other
    return Path(name).expanduser().resolve() == Path(other).expanduser().resolve()


def without_test_images(images: Images, dataset: Dataset, name: str) -> Images:
    """A foreign data set in the victim's size and channels, without the victim's test images.

    An image is left out if it equals a test image byte by byte. There are such images if one data set goes by two
    names, e.g. ``mnist`` and a copy of it as npz.

    Args:
        images: all training images of the foreign set.
        dataset: the victim's data set, with its test part.
        name: of the foreign set, for the error.

    Raises:
        InputError: nothing is left.
    """
    converted = convert_images(images.images, dataset.channels, dataset.size)
    held_out = {row.tobytes() for row in dataset.test.images.numpy()}
    keep = torch.tensor([row.tobytes() not in held_out for row in converted.numpy()], dtype=torch.bool)
    if not keep.any():
        raise InputError(f"pool: every image of {name!r} is a test image of the victim's data set")
    clean = Images(converted, images.labels)
    return clean if keep.all() else clean.take(keep.nonzero().squeeze(1))


def _counts(spec: PoolSpec, available: Mapping[str, int], count: int) -> dict[str, int]:
    """How many images each part gives; ``available`` has the parts that are finite."""
    if spec.size is None and len(spec.parts) == 1 and available:
        return dict(available)
    total = math.fsum(spec.parts.values())
    size = float(spec.size or count)
    size = min([size, *(number * total / spec.parts[name] for name, number in available.items())])
    # floor: a whole number of images; the tiny term undoes what the division lost
    size = math.floor(size * (1 + 1e-12))
    return {name: min(round(size * weight / total), available.get(name, size)) for name, weight in spec.parts.items()}
