"""What is unusual in a run: spikes, slow divergence, a machine that became slow.

spike       value > median + score sigma of the steps before, sigma = 1.4826 MAD: median and MAD,
            the median absolute deviation, do not move with the outliers that they are to find
            (Iglewicz & Hoaglin 1993). A gradient norm is compared by its logarithm.
divergence  Page-Hinkley's test (Page 1954) of the loss: the sum of its distances to its own moving
            average, less a tolerance, rises by more than a limit
update      how far a step moved the weights, as a spike of its logarithm's distance to the step
            before: a rate that is wrong for one step shows there at once, in the loss hardly
slow        a step, or the median of the last few, against the steps before

What decides about an update (loss, gradient norm, update) depends on the run's numbers alone, and
its state is saved with a checkpoint; what depends on the machine is only noted. text.py finds
unusual text.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WARM = 32  # values before anything is unusual
SIGMA = 1.4826  # standard deviations of a normal distribution per MAD
_RUN = 16  # unusual values in a row that are a new level, and no anomaly any more
_QUIET = 16  # steps after a note in which the same thing is not noted again
_RECENT = 12  # steps whose median shows a lasting change
_SLOW = 3.0  # times slower, over these steps
_LEAST_SECONDS = 0.02  # that a delay must be: less is what other programs take
_STALL = 8.0  # times the usual time, and a second more: one such step is enough
NUMBERS = ("loss", "grad_norm", "update", "text")  # series that follow from the run's numbers
_FORGETTING = 1 / 512  # weight of the newest loss in its moving average
_TOLERANCE, _RISE = 0.5, 50.0  # of Page-Hinkley's test, in standard deviations


@dataclass(frozen=True)
class Anomaly:
    """`value` of `series` was unusual at a step: `usual` is the median of the steps before it."""

    step: int
    kind: str  # "spike", "text", "divergence", "slow" or "growth"
    series: str
    value: float
    usual: float

    def words(self) -> str:
        """What happened, for a notice."""
        if self.kind == "divergence":
            return f"{self.series} has been rising to {self.value:.4g}, from {self.usual:.4g}"
        share = self.value / self.usual if self.usual > 0 else math.nan
        times = f"{share:.1f} times the usual {self.usual:.4g}"
        near = f"the usual is {self.usual:.4g}"
        unit = " nats per character" if self.kind == "text" else ""
        return f"{self.series} {self.value:.4g}{unit}, {times if share >= 2 else near}"


class Limits(NamedTuple):
    """The largest values of a step that are not unusual; infinite while little is known."""

    loss: float = math.inf
    grad_norm: float = math.inf


class Window:
    """The last `size` values of a series, sorted as well: median and MAD without sorting again."""

    def __init__(self, size: int, values: Sequence[float] = ()) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take a finite value in, and the oldest out."""
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._sorted.clear()

    def values(self) -> list[float]:
        """The values, oldest first."""
        return list(self._values)

    def median(self) -> float:
        """The middle value."""
        return _median(self._sorted)

    def sigma(self) -> float:
        """1.4826 times the median distance from the median."""
        middle = self.median()
        return SIGMA * _median(sorted(abs(value - middle) for value in self._sorted))


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Spikes:
    """Finds single values far above those before. `least` is how much above the median a value
    must be in any case, in units of the series' own."""

    def __init__(self, size: int, score: float, least: float, relative: bool = False) -> None:
        """With `relative`, `least` is a share of the median."""
        self.window = Window(size)
        self.run = 0  # unusual values in a row
        self._score, self._least, self._relative = score, least, relative
        self._limit: float | None = None

    def limit(self) -> float:
        """The largest value that is not unusual."""
        if len(self.window) < WARM:
            return math.inf
        if self._limit is None:
            middle = self.window.median()
            least = self._least * abs(middle) if self._relative else self._least
            self._limit = middle + max(self._score * self.window.sigma(), least)
        return self._limit

    def add(self, value: float, is_spike: bool) -> bool:
        """Take a value in; False where a spike is one of so many that it is a new level."""
        if not is_spike:
            self.run = 0
        else:
            self.run += 1
            if self.run < _RUN:
                return True
            self.window.clear()
            self.run = 0
        if math.isfinite(value):
            self.window.add(value)
            self._limit = None
        return not is_spike

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"values": self.window.values(), "run": self.run}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.window.clear()
        for value in state["values"]:
            self.window.add(float(value))
        self.run, self._limit = int(state["run"]), None


class Divergence:
    """Page-Hinkley's test of a series against its own moving average, in units of its sigma."""

    def __init__(self) -> None:
        self.mean = self.total = self.low = 0.0
        self.count = 0

    def add(self, value: float, sigma: float) -> bool:
        """Whether the series has been rising up to this value."""
        self.count += 1
        weight = max(_FORGETTING, 1 / self.count)
        scale = max(sigma, 0.01 * abs(self.mean), 1e-9)
        distance = (value - self.mean) / scale if self.count > 1 else 0.0
        self.mean += weight * (value - self.mean)
        # One outlier is a spike, and no rise: it counts as 3 sigma at most.
        self.total += max(-3.0, min(3.0, distance)) - _TOLERANCE
        self.low = min(self.low, self.total)
        if self.count < WARM or self.total - self.low <= _RISE:
            return False
        self.total = self.low = 0.0
        return True

    def state(self) -> list[float]:
        """Plain values for JSON."""
        return [self.mean, self.total, self.low, self.count]

    def restore(self, state: Sequence[float]) -> None:
        """Continue where `state` was taken."""
        self.mean, self.total, self.low = (float(value) for value in state[:3])
        self.count = int(state[3])


class Watch:
    """Watches the numbers of a run: `limits` before a step, `numbers` after it."""

    def __init__(self, size: int) -> None:
        self._loss = Spikes(size, score=6.0, least=0.1, relative=True)
        self._norm = Spikes(size, score=8.0, least=math.log(4.0))
        self._update = Spikes(size, score=8.0, least=math.log(4.0))
        self._last_update: float | None = None  # the logarithm of the last that was no spike
        self._divergence = Divergence()
        self._noted: dict[str, int] = {}

    def limits(self) -> Limits:
        """What loss and gradient norm of the next step must not exceed."""
        norm = self._norm.limit()
        return Limits(self._loss.limit(), math.exp(norm) if norm < 700 else math.inf)

    def numbers(
        self, step: int, loss: float, grad_norm: float, applied: bool | None = None
    ) -> list[Anomaly]:
        """What is unusual about a step's loss, in nats per token, and gradient norm. `applied` is
        what the device decided, by these limits, where it does."""
        limits = self.limits()
        seen = (
            ("loss", self._loss, loss, limits.loss, loss),
            ("grad_norm", self._norm, grad_norm, limits.grad_norm, _log(grad_norm)),
        )
        above = {name: not value <= limit for name, _, value, limit, _ in seen}
        if applied is not None and applied == any(above.values()):  # a rounding apart
            above = dict.fromkeys(above, False) | ({"loss": True} if not applied else {})
        found = []
        for name, spikes, value, _, compared in seen:
            usual = spikes.window.median() if len(spikes.window) else math.nan
            usual = math.exp(usual) if spikes is self._norm else usual
            known = spikes.add(compared, above[name])
            if not known and spikes is self._loss:
                self._divergence = Divergence()
            if known and above[name]:
                found.append(Anomaly(step, "spike", name, value, usual))
        mean = self._divergence.mean
        if not found and self._divergence.add(loss, self._sigma()):
            found.append(Anomaly(step, "divergence", "loss", loss, mean))
        return found

    def update(self, step: int, ratio: float) -> list[Anomaly]:
        """What is unusual about how far a step moved the weights: ||change|| / ||weights||."""
        value, last = _log(ratio), self._last_update
        rise = 0.0 if last is None else value - last
        is_spike = not rise <= self._update.limit()
        if self._update.add(rise, is_spike) and is_spike:
            return [Anomaly(step, "spike", "update", ratio, math.exp(last or 0.0))]
        self._last_update = value if math.isfinite(value) else last
        return []

    def _sigma(self) -> float:
        return self._loss.window.sigma() if self._loss.window else 1.0

    def is_new(self, anomaly: Anomaly) -> bool:
        """Whether the same thing was not noted shortly before."""
        last = self._noted.get(anomaly.series)
        self._noted[anomaly.series] = anomaly.step
        return last is None or not 0 <= anomaly.step - last <= _QUIET

    def state(self) -> dict[str, Any]:
        """Plain values for JSON: the numbers after this are those of a run that never stopped."""
        return {
            "loss": self._loss.state(),
            "grad_norm": self._norm.state(),
            "update": self._update.state() | {"last": self._last_update},
            "divergence": self._divergence.state(),
            "noted": {k: v for k, v in self._noted.items() if k in NUMBERS},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises KeyError, TypeError or ValueError where it is
        not one."""
        self._loss.restore(state["loss"])
        self._norm.restore(state["grad_norm"])
        if "update" in state:  # not in checkpoints of earlier versions
            self._update.restore(state["update"])
            last = state["update"]["last"]
            self._last_update = None if last is None else float(last)
        self._divergence.restore(state["divergence"])
        self._noted = {str(name): int(step) for name, step in state["noted"].items()}


class MachineWatch:
    """Watches what depends on the machine: seconds of a step and of its data, memory, and how far
    updates move the layers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seconds = Spikes(size, score=12.0, least=2.0, relative=True)
        self._data = Spikes(size, score=20.0, least=0.01)
        self._memory = Spikes(size, score=20.0, least=0.25, relative=True)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._often = {"step_seconds": 0, "data_seconds": 0}
        self._late = {"step_seconds": False, "data_seconds": False}  # and it was noted
        self._layers: dict[str, Spikes] = {}
        self._is_slow = False

    def step(
        self, step: int, seconds: float, data_seconds: float, memory_bytes: float
    ) -> list[Anomaly]:
        """What is unusual about a step; `seconds` are without those that other programs took."""
        found = [
            *self._slow(step, "step_seconds", self._seconds, seconds),
            *self._slow(step, "data_seconds", self._data, data_seconds),
            *self._spike(step, "growth", "memory_bytes", self._memory, memory_bytes),
        ]
        return found or self._lasting(step, seconds)

    def _slow(self, step: int, name: str, spikes: Spikes, value: float) -> list[Anomaly]:
        """A delay that comes again within a few steps, or a long one; other programs on the
        machine make a single step late every now and then."""
        found = self._spike(step, "slow", name, spikes, value)
        if not found or value - found[0].usual < _LEAST_SECONDS:
            self._often[name] = max(0, self._often[name] - 1)
            self._late[name] = self._late[name] and self._often[name] > 0
            return []
        self._often[name] = min(self._often[name] + _RECENT // 2, 2 * _RECENT)
        usual = found[0].usual
        is_long = value > _STALL * max(usual, self._usual_seconds()) and value > usual + 1.0
        was, self._late[name] = self._late[name], is_long or self._often[name] > _RECENT
        return found if self._late[name] and not was else []

    def _usual_seconds(self) -> float:
        return self._seconds.window.median() if len(self._seconds.window) else 0.0

    def layers(self, step: int, ratios: Mapping[str, float]) -> list[Anomaly]:
        """What is unusual about the update-to-weight ratios of the layers."""
        found = []
        for layer, ratio in ratios.items():
            spikes = self._layers.setdefault(
                layer, Spikes(self._size, score=7.0, least=math.log(3.0))
            )
            name = f"update_ratio of {layer}"
            for anomaly in self._spike(step, "spike", name, spikes, _log(ratio)):
                usual = math.exp(anomaly.usual)
                found.append(Anomaly(step, "spike", name, ratio, usual))
        return found

    def _spike(
        self, step: int, kind: str, name: str, spikes: Spikes, value: float
    ) -> list[Anomaly]:
        is_spike = value > spikes.limit()
        usual = spikes.window.median() if len(spikes.window) else math.nan
        counts = spikes.add(value, is_spike)
        return [Anomaly(step, kind, name, value, usual)] if is_spike and counts else []

    def _lasting(self, step: int, seconds: float) -> list[Anomaly]:
        """A speed that is lower for some steps; noted once, until it is as before."""
        self._recent.append(seconds)
        if len(self._seconds.window) < WARM + _RECENT or len(self._recent) < _RECENT:
            return []
        usual, now = self._seconds.window.median(), _median(sorted(self._recent))
        was = self._is_slow
        self._is_slow = now > max(_SLOW * usual, usual + _LEAST_SECONDS)
        if was or not self._is_slow or self._late["step_seconds"]:
            return []
        return [Anomaly(step, "slow", "step_seconds", now, usual)]


def _log(value: float) -> float:
    """The logarithm of a value that should be positive and finite; else what is no one's."""
    return math.log(value) if 0 < value < math.inf else (-700.0 if value == 0 else math.nan)
