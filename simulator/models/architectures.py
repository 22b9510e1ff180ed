"""The architectures by name: those of this package, and those of plug-ins (entry points ``exsim.models``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulator.component import Table
from simulator.models import plain, vision
from simulator.models.plain import Network


@dataclass(frozen=True)
class Architecture:
    """A network that can be built by name. A plug-in's entry point names one, e.g. ``mine = "my_package:TINY"``.

    Attributes:
        name: what a configuration and a model file call it.
        build: takes ``(channels, size, classes)``. It returns the body, which maps normalised images ``(B, C, size,
            size)`` to features ``(B, D)``, and the last linear layer, which maps these to logits ``(B, K)``. It draws
            its weights from torch's global generator, and also works on the meta device.
        about: one line for ``exsim list models``, with the paper.
        smallest: side of the smallest images that it takes, in pixels.
    """

    name: str
    build: Callable[[int, int, int], Network]
    about: str
    smallest: int = 8


ARCHITECTURES: Table[Architecture] = Table(
    "model",
    Architecture,
    "exsim.models",
    (
        Architecture("linear", plain.linear, "one linear layer on the pixels, for closed-form checks", 1),
        Architecture("naivenet", plain.naivenet, "2 conv + 2 FC, DeepTracer's Fashion-MNIST net", 4),
        Architecture("lenet5", plain.lenet5, "LeNet-5 (LeCun et al., 1998)", 4),
        Architecture("vgglike", plain.vgglike, "4 conv + 3 FC, composite attack's net (Lin et al., CCS 2020)", 4),
        Architecture("alexnet", plain.alexnet, "AlexNet (Krizhevsky et al., NeurIPS 2012)"),
        Architecture("vgg16", plain.vgg16, "VGG-16 with batch normalisation (Simonyan and Zisserman, ICLR 2015)"),
        Architecture("resnet18", vision.resnet18, "ResNet-18 (He et al., CVPR 2016)"),
        Architecture("resnet34", vision.resnet34, "ResNet-34 (He et al., CVPR 2016)"),
        Architecture("resnet50", vision.resnet50, "ResNet-50 (He et al., CVPR 2016)"),
        Architecture("densenet161", vision.densenet161, "DenseNet-161 (Huang et al., CVPR 2017)"),
        Architecture("mobilenet", vision.mobilenet, "MobileNetV2 (Sandler et al., CVPR 2018)"),
        Architecture("shufflenet", vision.shufflenet, "ShuffleNetV2 x1.0 (Ma et al., ECCV 2018)"),
        Architecture("squeezenet", vision.squeezenet, "SqueezeNet 1.1 (Iandola et al., 2016)"),
        Architecture("efficientnet_b2", vision.efficientnet_b2, "EfficientNet-B2 (Tan and Le, ICML 2019)"),
        Architecture("vit", vision.vit, "small Vision Transformer (Dosovitskiy et al., ICLR 2021)"),
    ),
)
