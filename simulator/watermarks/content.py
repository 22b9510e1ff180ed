"""Content: a word written over images of one class (Zhang et al., AsiaCCS 2018, "Protecting intellectual property").

Their Algorithm 1 takes the training images of a source class, writes a mark ("TEST") on each, and labels them with a
target class. The paper shows the word but states no size, place or opacity; here it is white, at the bottom, and nearly
as wide as the image. The word is drawn in the bitmap font that comes with Pillow, so it needs no font file and looks
the same with every version of it. ``source: all`` marks every class, as DeepTracer's figures for it suggest.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from torch import Tensor

from simulator.watermarks.parts.trigger_set import Stamp, Stamped


class Content(Stamped):
    """A word written over training images of a source class, answered with one target."""

    paper: ClassVar[str] = "Zhang et al., AsiaCCS 2018"

    name: Literal["content"] = "content"
    text: str = Field("TEST", min_length=1, max_length=20, pattern="^[!-~]+$", description="printable, no spaces")
    width: float = Field(0.9, gt=0, le=1, description="of the text, over the image's width")
    opacity: float = Field(1.0, gt=0, le=1)

    def stamp(self, channels: int, size: int, generator: torch.Generator) -> Stamp:
        """See :meth:`Stamped.stamp`; nothing about it is random."""
        cover = self.opacity * text_mask(self.text, size, self.width)

        def apply(images: Tensor) -> Tensor:
            marked = images.to(torch.float32) * (1 - cover) + 255 * cover
            return marked.round_().to(torch.uint8)

        return apply


def text_mask(text: str, size: int, width: float) -> Tensor:
    """Where a text covers a square image, ``(size, size)`` float in [0, 1]: ``width`` of the image wide (one pixel at
    least), centred, one pixel above the bottom edge."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    sheet = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(sheet).text((-left, -top), text, fill=255, font=font)
    word = sheet.crop(sheet.getbbox() or (0, 0, *sheet.size))
    columns = max(1, round(width * size))
    rows = min(size - 1, max(1, round(word.height * columns / word.width)))
    # averaging areas when it shrinks, so that no stroke falls between two pixels
    small = np.asarray(word.resize((columns, rows), Image.Resampling.BOX), dtype=np.float32) / 255
    mask = torch.zeros(size, size)
    start = (size - columns) // 2
    mask[size - 1 - rows : size - 1, start : start + columns] = torch.from_numpy(small)
    return mask
