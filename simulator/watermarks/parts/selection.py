"""Which classes DeepTracer's mosaics are made of, and what label they get (Yang et al., AAAI 2026, Eq. 1 to 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.models import Classifier
from simulator.seeding import draw_seed
from simulator.training.predict import predict, predict_features


def class_centroids(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of every class, ``(classes, D)`` from ``(N, D)`` and ``(N,)`` (Eq. 1)."""
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype).index_add_(0, labels, features)
    return sums / labels.bincount(minlength=classes).clamp_min(1).unsqueeze(1)


def representative_classes(centroids: Tensor, count: int, seed: int) -> tuple[int, ...]:
    """K-means over the class centroids ``(C, D)`` into ``count`` clusters (Eq. 2), and from each cluster the class
    nearest to its centre, in ascending order.

    The two classes of a cluster of two are equally near to its centre, but for rounding, and rounding differs with the
    number of threads; nearness within a millionth is therefore a tie, and the lowest class wins it.
    """
    from sklearn.cluster import KMeans  # attackers know of this module, and need not wait for scikit-learn

    means = KMeans(count, n_init=10, random_state=seed % 2**32).fit(centroids.double().numpy())
    distances = torch.from_numpy(means.transform(centroids.double().numpy()))
    members = torch.from_numpy(means.labels_).unsqueeze(1) == torch.arange(count)
    nearest = distances.masked_fill(~members, torch.inf)
    tied = nearest <= nearest.min(0).values + 1e-6 * distances.max()
    return tuple(sorted(tied.int().argmax(0).tolist()))


def adaptive_sources(
    benign: Classifier, data: Images, classes: int, count: int, generator: torch.Generator
) -> tuple[int, ...]:
    """The paper's adaptive selection: ``count`` classes that spread over the benign model's penultimate features."""
    features = predict_features(benign, data.images)
    return representative_classes(class_centroids(features, data.labels, classes), count, draw_seed(generator))


def least_likely_target(benign: Classifier, mosaics: Tensor, excluded: tuple[int, ...]) -> int:
    """The class of least mean probability over the mosaics under the benign model (Eq. 3 and 4), ``excluded`` ones
    left out."""
    mean = predict(benign, mosaics).double().mean(0)
    mean[list(excluded)] = torch.inf
    return int(mean.argmin())
