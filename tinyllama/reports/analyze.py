"""What the steps of a run and the kernels of its profile have in common, in words.

    groups      k-means (scikit-learn) on standardized logarithms; k by the silhouette
    outliers    steps far slower, or with a far higher loss or norm, than the steps around them;
                what they share is a threshold of a one-level decision tree, or an event such as a
                checkpoint just before, that is more frequent among them than among the others

scikit-learn is the extra `observe`.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.config import load_config
from tinyllama.data.batches import Batches
from tinyllama.data.files import is_cache
from tinyllama.errors import TinyllamaError
from tinyllama.reports.runs import Column, KeptOperation, Run
from tinyllama.system.untrusted import printable
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.train.preferences import PAIR_OBJECTIVES
from tinyllama.train.prepare import texts

_LEAST_STEPS = 50
_MOST_POINTS = 2000  # that k-means and the silhouette look at
_SLOWER = 1.15  # times, that are worth a line
_SURE = 3.5  # standard deviations from chance
_AROUND = 51  # steps that a step is compared with
_SEED = 0
_MOST_GAPS = 10  # steps per line of metrics: a run that came in from elsewhere begins late

Mask = npt.NDArray[np.bool_]


def available() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def findings(run: Run) -> list[str]:
    """One line per finding; needs scikit-learn."""
    from threadpoolctl import threadpool_limits

    # Its threads wait for each other in a loop, which is slow beside a run that trains.
    with threadpool_limits(1):
        few = f"{len(run.steps)} steps: too few to group, {_LEAST_STEPS} are needed"
        lines = list(_step_lines(run)) or [few]
        if len(kernels := run.roofline_points) >= 4:
            lines += _kernel_lines(kernels)
    return lines


# ---- steps


def _step_lines(run: Run) -> Iterator[str]:
    seconds, loss = run.columns["step_seconds"], run.columns["loss"]
    usable = np.isfinite(loss) & (seconds > 0)
    usable[: min(5, len(usable))] = False  # they wait for compilers
    if usable.sum() < _LEAST_STEPS:
        return
    features = _features(run)
    conditions = list(_conditions(run, features, usable))
    yield from _groups(features, usable)
    yield from _speed_lines(run.steps, seconds, usable, conditions)
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        values = run.columns[name]
        yield from _outlier_lines(
            run.steps, values, usable & np.isfinite(values), words, conditions
        )


def _features(run: Run) -> dict[str, Column]:
    """What steps are grouped by, one value per step."""
    c = run.columns
    features = {"time": c["step_seconds"], "loss against the steps around": _change(c["loss"])}
    features["gradient norm"] = c["grad_norm"]
    lengths = document_lengths(run)
    if lengths is not None:
        features["length of its documents"] = lengths
    return features


def _change(loss: Column) -> Column:
    return np.exp(loss - _local_median(loss))  # a ratio of probabilities: positive, as the others


def _local_median(values: Column) -> Column:
    """The median of the steps around each one."""
    half = _AROUND // 2
    padded = np.pad(values, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _AROUND)
    with np.errstate(all="ignore"):
        return np.asarray(np.nanmedian(windows, axis=-1))


def document_lengths(run: Run) -> Column | None:
    """The longest document of each step's batch, in tokens, found from the text's own order; None
    where the text is not here any more, or its tokens are not kept, it is pairs, or the run left
    that order."""
    last = int(run.steps[-1])
    if run.rollbacks or not run.config or not 0 < last <= _MOST_GAPS * len(run.steps):
        return None
    with suppress(TinyllamaError, OSError):
        config = load_config(str(run.path / "config.toml"))
        if not is_cache(Path(config.data.cache_dir)):
            return None  # no cache is made where somebody else's run names a place
        folder = run.path / run.checkpoints[-1][1] if run.checkpoints else Path()
        tokenizer = open_tokenizer(folder)
        t = config.training
        if t.objective in PAIR_OBJECTIVES:
            return None
        text = texts(config, tokenizer, show=False, make=False)[0]
        T = config.context_length
        batches = Batches(text, T, t.batch_size, t.seed, pack=config.data.pack)
        sizes = np.diff(np.append(text.starts, text.n_tokens))
        longest = np.full(len(run.steps), np.nan)
        place = {int(step): index for index, step in enumerate(run.steps)}
        for step in range(1, last + 1):
            batches.skip()
            if step in place:
                longest[place[step]] = sizes[batches.documents()].max(initial=0)
        return longest
    return None


def _against_around(values: Column, usable: Mask) -> Column:
    """Values as a share of the median of the steps around each: a machine that has other work for
    a while makes all of those slower."""
    return values / _local_median(np.where(usable, values, np.nan))


def _are_larger(some: Column, others: Column) -> bool:
    """Whether some values are larger than others by more than chance: Wilcoxon's rank-sum test."""
    n, m = len(some), len(others)
    ranks = np.argsort(np.argsort(np.concatenate([some, others])))[:n]
    above = ranks.sum() - n * (n - 1) / 2 - n * m / 2
    return bool(above > _SURE * math.sqrt(n * m * (n + m + 1) / 12))


def _groups(features: dict[str, Column], usable: Mask) -> Iterator[str]:
    """Groups of steps that differ clearly, each with what sets it apart."""
    names = [name for name, values in features.items() if _is_usable(values, usable)]
    table = np.column_stack([np.log(features[name][usable]) for name in names])
    labels = _clusters(table)
    if labels is None:
        yield f"{usable.sum():,} steps form one group: none differ clearly from the others"
        return
    middle = np.median(table, axis=0)
    for label in np.unique(labels):
        inside = table[labels == label]
        ratios = np.exp(np.median(inside, axis=0) - middle)
        apart = [f"{n} x {r:.2f}" for n, r in zip(names, ratios, strict=True) if not 0.9 < r < 1.1]
        share = len(inside) / len(table)
        what = ", ".join(apart) or "as the median step"
        yield f"group of {len(inside):,} steps ({share:.0%}): {what}"


def _is_usable(values: Column, usable: Mask) -> bool:
    return bool(np.isfinite(values[usable]).all() and (values[usable] > 0).all())


def _clusters(table: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """The group of each row, or None where no grouping is clear (silhouette below 0.35)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    spread = table.std(axis=0)
    scaled = (table - table.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    seen = scaled[:: max(1, len(scaled) // _MOST_POINTS)]
    best, best_score = None, 0.35
    distinct = len(np.unique(seen, axis=0))
    for k in range(2, min(5, len(seen) - 1, distinct) + 1):
        model = KMeans(k, n_init=4, random_state=_SEED).fit(seen)
        labels = np.unique(model.labels_)
        score = silhouette_score(seen, model.labels_) if len(labels) > 1 else 0.0
        if score > best_score:
            best, best_score = model, score
    return None if best is None else best.predict(scaled)


class _Condition(NamedTuple):
    words: str  # "steps ..."
    holds: Mask


def _conditions(run: Run, features: dict[str, Column], usable: Mask) -> Iterator[_Condition]:
    """What steps may have in common: an event before them, or a value above a threshold."""
    steps, c = run.steps, run.columns
    validated = np.isfinite(c["val_loss"])
    yield _Condition("right after a validation", np.concatenate([[False], validated[:-1]]))
    every = run.config.get("checkpointing.save_every")
    if isinstance(every, int) and every > 1:
        yield _Condition("right after a checkpoint", (steps - 1) % every == 0)
    for name in ("length of its documents",):
        if name not in features:
            continue
        values = features[name]
        threshold = _threshold(values, _against_around(c["step_seconds"], usable), usable)
        if threshold is not None:
            yield _Condition(f"with documents over {threshold:.0f} tokens", values > threshold)


def _threshold(values: Column, target: Column, usable: Mask) -> float | None:
    """Where a one-level decision tree would cut `values` to explain `target` best."""
    from sklearn.tree import DecisionTreeRegressor

    known = usable & np.isfinite(values)
    if known.sum() < _LEAST_STEPS:
        return None
    least = max(10, int(0.02 * known.sum()))
    tree = DecisionTreeRegressor(max_depth=1, min_samples_leaf=least, random_state=_SEED)
    tree.fit(values[known].reshape(-1, 1), np.log(target[known]))
    threshold = float(tree.tree_.threshold[0])
    return threshold if tree.tree_.node_count > 1 else None


def _speed_lines(
    steps: Column, seconds: Column, usable: Mask, conditions: Sequence[_Condition]
) -> Iterator[str]:
    """Conditions under which steps are slower, and the slow steps."""
    times = _against_around(seconds, usable)
    for words, holds in conditions:
        inside, outside = usable & holds, usable & ~holds
        if min(inside.sum(), outside.sum()) < 5:
            continue
        ratio = np.median(times[inside]) / np.median(times[outside])
        if ratio >= _SLOWER and _are_larger(times[inside], times[outside]):
            yield f"steps {words} are {ratio:.1f} times slower ({inside.sum():,} steps)"
    yield from _outlier_lines(steps, seconds, usable, "time", conditions)


def _outlier_lines(
    steps: Column, values: Column, usable: Mask, name: str, conditions: Sequence[_Condition]
) -> Iterator[str]:
    """The steps whose value is far above those around them, and what most of them share."""
    local = _local_median(np.where(usable, values, np.nan))
    with np.errstate(all="ignore"):
        ratios = np.where(usable, values / local, np.nan)
        logs = np.log(ratios)
    spread = 1.4826 * np.nanmedian(np.abs(logs))
    far = usable & (logs > max(6 * spread, np.log(1.3)))
    if not far.any():
        return
    times = float(np.nanmedian(ratios[far]))
    shown = ", ".join(f"{step:.0f}" for step in steps[far][:5]) + (", ..." if far.sum() > 5 else "")
    which = f"step {shown} has" if far.sum() == 1 else f"{far.sum():,} steps ({shown}) have"
    line = f"{which} {times:.1f} times the {name} of those around"
    shared = [
        f"{(holds & far).sum() / far.sum():.0%} of them are steps {words}, and "
        f"{(holds & usable & ~far).sum() / max(1, (usable & ~far).sum()):.0%} of the others"
        for words, holds in conditions
        if (holds & far).sum() / far.sum()
        > 2 * (holds & usable & ~far).sum() / max(1, (usable & ~far).sum())
        and (holds & far).sum() >= 2
    ]
    yield "; ".join([line, *shared])


# ---- kernels


def _kernel_lines(kernels: Sequence[KeptOperation]) -> Iterator[str]:
    """Groups of kernels by time per call, arithmetic intensity and size: bytes per call."""
    table = np.array([[math.log(value) for value in _features_of(k)] for k in kernels])
    labels = _clusters(table)
    if labels is None:
        return
    for label in np.unique(labels):
        group = [kernel for kernel, of in zip(kernels, labels, strict=True) if of == label]
        group.sort(key=lambda kernel: -kernel.share)
        seconds, intensity, size = np.median([_features_of(k) for k in group], axis=0)
        names = ", ".join(printable(kernel.name) for kernel in group[:3])
        yield (
            f"group of {len(group)} kernels, {sum(k.share for k in group):.0%} of a step: "
            f"{intensity:.1f} FLOP per byte, {_microseconds(seconds)} microseconds and "
            f"{size / 1e6:.2g} MB per call: {names}"
        )


def _microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _features_of(kernel: KeptOperation) -> tuple[float, float, float]:
    """Seconds per call, operations per byte, bytes per call; all above 0."""
    seconds = max(kernel.seconds, 1e-9) / max(1.0, kernel.calls)
    return seconds, kernel.intensity, max(1.0, 1e9 * kernel.gb_per_second * seconds)
