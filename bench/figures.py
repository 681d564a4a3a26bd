"""Figures of several runs: medians with their spread, ratios within one run, and their bounds."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Figure:
    """One contender's figure, one value for each run."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f" ({plain(min(self.values))}-{plain(max(self.values))})" if len(self.values) > 1 else ""
        return f"{plain(self.median)}{spread} {self.unit}".strip()


@dataclass
class Check:
    """A bound of a figure.

    Attributes:
        always: Whether every run has to keep to the bound, for events that must never happen.
    """

    what: str
    figure: Figure
    bound: float
    at_most: bool = True
    always: bool = False

    @property
    def reached(self) -> bool:
        """Whether the median, or the worst value, keeps to the bound."""
        worst = max if self.at_most else min
        value = worst(self.figure.values) if self.always else self.figure.median
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def verdict(self) -> str:
        """The verdict as text."""
        return "reached" if self.reached else "not reached"

    @property
    def asked(self) -> str:
        """The bound as text."""
        return f"{'≤' if self.at_most else '≥'} {plain(self.bound)}"


@dataclass
class Row:
    """One row of the table: the metric, the figures of all contenders, the bounds, and a note."""

    metric: str
    figures: list[Figure]
    checks: list[Check] = field(default_factory=list)
    note: str = ""


def plain(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ratio(above: Figure, below: Figure) -> Figure:
    """Return the ratios within each run: the machine is faster in one than in another."""
    return Figure("ratio", "", [a / b for a, b in zip(above.values, below.values, strict=True)])


def percentile(values: list[float], part: float) -> float:
    """Return the value below which this part of all values is."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def machine(folder: Path) -> dict[str, str]:
    """Return a description of this machine."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next(int(line.split()[1]) // 1_000_000 for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    inside = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    return {
        "CPU": f"{os.cpu_count()} of {cpu}",
        "memory": f"{memory} GB",
        "file system": max(inside)[1],
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()
