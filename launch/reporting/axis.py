"""An axis of a chart: which numbers it shows, where they lie on it, and how they are written."""

import math
from dataclasses import dataclass

import numpy as np

from triptych.launch.reporting.step_table import Numbers

FEW_TICKS, MOST_TICKS = 3, 6
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Tick:
    """A number written beside an axis."""

    place: float
    """Percent of the axis."""
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, ``low`` < ``high``; both positive where it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def over(cls, values: Numbers, *, is_log: bool = False, from_zero: bool = False) -> "Axis":
        """An axis that shows all of ``values``, which are finite, with a little room."""
        if not len(values):
            return cls(0.0, 1.0)
        low, high = float(values.min()), float(values.max())
        if is_log:
            room = (high / low) ** 0.04 if high > low else 1.1
            return cls(low / room, high * room, is_log=True)
        room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(min(0.0, low) if from_zero else low - room, high + room)

    @classmethod
    def along(cls, values: Numbers) -> "Axis":
        """An axis from the first of ``values`` to the last, without room."""
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        return cls(low, high if high > low else low + 1)

    def places(self, values: Numbers) -> Numbers:
        """Shares of the axis, 0 at ``low`` and 1 at ``high``."""
        if self.is_log:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def ticks(self) -> list[Tick]:
        """A few round numbers."""
        numbers = self._round_numbers()
        places = self.places(np.array(numbers, dtype=np.float64))
        return [
            Tick(round(100 * float(place), 2), compact(number))
            for number, place in zip(numbers, places, strict=True)
        ]

    def _round_numbers(self) -> list[float]:
        for factors in ((1, 2, 5), (1, 3), (1,)) if self.is_log else ():
            powers = [10.0**exponent for exponent in self._decades()]
            found = [factor * power for power in powers for factor in factors]
            found = [number for number in found if self.low <= number <= self.high]
            if len(found) > MOST_TICKS and factors == (1,):
                return found[:: math.ceil(len(found) / MOST_TICKS)]
            if FEW_TICKS <= len(found) <= MOST_TICKS:
                return found
        rough = (self.high - self.low) / (MOST_TICKS - 1)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]

    def _decades(self) -> range:
        """Exponents of ten that the axis reaches into."""
        return range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))


def compact(number: float) -> str:
    """As "1.23M", "45.6k", "0.0789", "1e-5" or "2.35"."""
    size = abs(number)
    for unit, letter in _UNITS:
        if size >= 0.9995 * unit:
            return f"{_digits(number / unit)}{letter}"
    if size < 0.9995e-3 and number:
        mantissa, _, exponent = f"{number:.2e}".partition("e")
        return f"{_digits(float(mantissa))}e{int(exponent)}"
    return _digits(number)


def _digits(number: float) -> str:
    """Three of them that count, without zeros behind the point."""
    text = f"{number:.3g}"
    return f"{number:.0f}" if "e" in text else text
