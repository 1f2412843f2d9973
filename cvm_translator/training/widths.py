"""The bit widths that training passes through, and when one gives way to the next.

A course has one width for quantisation-aware training, and falling ones for progressive quantisation (16, 8, 4). A
width gives way at a validation whose verdict is sound and whose quality is held against the best of the width before.
From then on a new best is looked for, since scores at different widths do not compare. At the end the last width is
delivered if its quality was held; otherwise the one before it, which was.
"""

from __future__ import annotations

from dataclasses import dataclass

UNROUNDED_BITS = 16
"""At this width training sees no rounding: sixteen bits are as good as float."""


@dataclass(frozen=True)
class WidthCourse:
    """See the module's docstring."""

    widths: tuple[int, ...]
    """Bits, from wide to narrow; the last one is to be deployed."""
    first_step: int = 1
    """The first step that training sees rounded; for several widths, the first at which one may give way."""

    def training_bits(self, step: int, index: int) -> int:
        """What the weights are rounded to in the forward pass of a step; UNROUNDED_BITS is not at all."""
        return self.widths[index] if len(self.widths) > 1 or step >= self.first_step else UNROUNDED_BITS

    def may_narrow(self, step: int, index: int) -> bool:
        """Whether a width may give way after this step, quality permitting."""
        return index + 1 < len(self.widths) and step + 1 >= self.first_step


NO_COURSE = WidthCourse((UNROUNDED_BITS,))
"""Training that knows nothing of rounding."""
