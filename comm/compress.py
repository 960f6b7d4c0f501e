"""Rows in one byte a value: int8, or fp8 (e4m3: 4 bits of exponent, 3 of mantissa), each row with a scale of its own.

A row is divided by its scale, by which its largest value becomes the largest that the byte can hold, and rounded to the
nearest. How far a value x that comes back is from what was sent, in a row with the largest magnitude m, is at most
m / 254 for int8, and for fp8 the larger of |x| / 17 and m / 448 / 1024; then it is rounded to the dtype of the rows.
Hidden states of language models have a few values a hundred times the others, which cost int8 dear and fp8 little. What
comes back of a row depends on that row alone, so that batches do not change results.
"""

from __future__ import annotations

import torch

SCHEMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

_SCALE_BYTES = 4
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # below, a scale has too few bits to divide by


class Rows:
    """Rows [R, H] as they travel: `values` [R, H] of one byte each, and `scales` [R, 1] in float32."""

    def __init__(self, scales: torch.Tensor, values: torch.Tensor) -> None:
        self.scales = scales
        self.values = values

    @classmethod
    def of(cls, x: torch.Tensor, scheme: str) -> Rows:
        """x: [R, H], of any float dtype; a row with a value that is not finite comes back without any."""
        dtype = SCHEMES[scheme]
        wide = x.float()
        scales = wide.abs().amax(-1, keepdim=True).div_(_LARGEST[dtype]).clamp_(min=_LEAST_SCALE)
        scaled = wide / scales
        return cls(scales, (scaled.round_() if dtype == torch.int8 else scaled).to(dtype))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Rows [R, H] again."""
        return (self.values.float() * self.scales).to(dtype)


class Packing:
    """How elements `start` to `stop` of rows of `width` values, counted over all rows, lie in one message: the scales
    of the rows that they touch, then the values.
    """

    def __init__(self, start: int, stop: int, width: int, scheme: str) -> None:
        self._start, self._stop, self._width = start, stop, width
        self._dtype = SCHEMES[scheme]
        self.rows = slice(start // width, -(-stop // width))
        self._scale_bytes = _SCALE_BYTES * (self.rows.stop - self.rows.start)
        self.num_bytes = self._scale_bytes + stop - start

    def pack(self, rows: Rows, first_row: int) -> torch.Tensor:
        """The message [num_bytes] uint8. rows: all of those touched, and perhaps others, from row `first_row` on."""
        scales = rows.scales[self.rows.start - first_row : self.rows.stop - first_row]
        offset = first_row * self._width
        values = rows.values.view(torch.uint8).view(-1)[self._start - offset : self._stop - offset]
        return torch.cat([scales.view(-1).view(torch.uint8), values])

    def unpack(self, message: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The elements [stop - start] of a message."""
        scales = message[: self._scale_bytes].view(torch.float32).view(-1, 1)
        whole = message.new_zeros(len(scales) * self._width)
        first = self._start - self.rows.start * self._width
        part = slice(first, first + self._stop - self._start)
        whole[part] = message[self._scale_bytes :]
        return Rows(scales, whole.view(self._dtype).view(-1, self._width)).decode(dtype).view(-1)[part]
