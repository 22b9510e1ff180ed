"""The model zoo: small-image classifiers by name, each with its own normalisation, and their files.

    model = build("naivenet", channels=1, size=28, classes=10, generator=torch.Generator().manual_seed(0))
    logits, features = model.forward_with_features(images)  # images: uint8, or float in [0, 1]
    save_model(model, "victim.safetensors")

Every architecture of this package takes square images of 8 pixels and more. Images up to 64 pixels get the usual stem
for small images; larger ones get the stem of the paper. The architectures of ``vision.py`` import torchvision when they
are built; nothing else here does. Plug-ins add architectures by the entry points ``exsim.models``: see `Architecture`.
"""

from simulator.models.architectures import ARCHITECTURES, Architecture
from simulator.models.classifier import (
    Classifier,
    ModelSpec,
    build,
    describe_models,
    parameter_count,
)
from simulator.models.storage import from_bytes, load_model, save_model, to_bytes

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Classifier",
    "ModelSpec",
    "build",
    "describe_models",
    "from_bytes",
    "load_model",
    "parameter_count",
    "save_model",
    "to_bytes",
]
