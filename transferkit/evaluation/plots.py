"""The same findings as pictures, with matplotlib (the `plots` extra).

Every function draws on the axes it is given, or on new ones, and returns them. Colours are Okabe and Ito's (2008), which
people with colour-blindness tell apart; lines also differ in dash, so that a grey print keeps them apart. No setting of
matplotlib's is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import EvaluationError, MissingExtraError
from transferkit.evaluation.estimating import sampling_of
from transferkit.evaluation.ranking import Curve, auc_statistic, average_precision_statistic, precision_recall_curve, roc_curve
from transferkit.evaluation.resampling import multiplicities
from transferkit.evaluation.rows import FloatArray, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transferkit.evaluation.report import Evaluation

__all__ = [
    "confusion",
    "learning_rate_curve",
    "per_class",
    "precision_recall",
    "reliability",
    "roc",
    "training_curves",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: One for each line that is drawn at most, so that no two are told apart by colour alone.
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (7, 2, 1, 2, 1, 2)), (0, (9, 3)))
GREY = "#777777"
#: One line each up to this many classes; beyond, the best and the worst ones.
MOST_LINES = 6
BAND_RESAMPLES = 400


def _axes(ax: Axes | None, *, width: float = 5.0, height: float = 4.2) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingExtraError.of("Drawing a picture", package="matplotlib", extra="plots") from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _dress(ax: Axes, *, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize="medium", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _grid(ax: Axes) -> None:
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _short(name: str) -> str:
    """The name, its middle left out where it is long: names that begin alike often differ at the end."""
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"


def _room(axes: Axes, *, points: float, down: bool = True) -> int:
    """How many labels of so many points stand beside one another along an axis."""
    box = axes.get_window_extent()
    return max(1, int((box.height if down else box.width) * 72 / axes.figure.dpi / points))


Corner = Literal["lower right", "lower left", "upper right", "upper left"]
#: Where a legend may stand, and the lower left end of the box that it takes there.
_CORNERS: dict[Corner, tuple[float, float]] = {
    "lower right": (0.45, 0.0),
    "lower left": (0.0, 0.0),
    "upper right": (0.45, 0.58),
    "upper left": (0.0, 0.58),
}


def _empty_corner(lines: Sequence[Any]) -> Corner:
    """The corner of the unit square in which the curves have the fewest points."""
    grid = np.linspace(0, 1, 101)
    heights = np.concatenate([np.interp(grid, *np.asarray(line.get_data())) for line in lines])
    places = np.tile(grid, len(lines))

    def within(corner: Corner) -> int:
        left, low = _CORNERS[corner]
        return int(((places >= left) & (places <= left + 0.55) & (heights >= low) & (heights <= low + 0.42)).sum())

    return min(_CORNERS, key=within)


def _problems(rows: Rows, asked: str) -> list[tuple[str, NDArray[np.bool_], FloatArray]]:
    """Name, positives and scores of each curve; classes that no row has, or every row, have none."""
    if rows.kind == "regression":
        raise EvaluationError(asked, found="a regression task", fix="evaluate a classifier")
    if rows.kind != "multilabel" and rows.width == 2:
        every = [(rows.classes[1], rows.labels == 1, rows.class_probabilities[:, 1])]
    elif rows.kind == "multilabel":
        every = [(name, rows.labels[:, c] == 1, rows.predictions[:, c]) for c, name in enumerate(rows.classes)]
    else:
        every = [(name, rows.labels == c, rows.predictions[:, c]) for c, name in enumerate(rows.classes)]
    kept = [one for one in every if one[1].any() and not one[1].all()]
    if not kept:
        raise EvaluationError(asked, found="one class only", fix="give rows of at least two classes")
    return kept


def _band(
    rows: Rows, positive: NDArray[np.bool_], scores: FloatArray, *, precision: bool, level: float, grid: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The pointwise bootstrap interval of a curve over a grid of its x."""
    heights = []
    for drawn in multiplicities(sampling_of(rows, stratified=False), resamples=BAND_RESAMPLES, seed=0):
        for weights in drawn if rows.weight is None else drawn * rows.weight:
            if weights[positive].sum() == 0 or weights[~positive].sum() == 0:
                continue
            curve = precision_recall_curve(positive, scores, weights) if precision else roc_curve(positive, scores, weights)
            heights.append(np.interp(grid, curve.x, curve.y))
    if not heights:
        return np.full_like(grid, np.nan), np.full_like(grid, np.nan)
    low, high = np.quantile(heights, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _curves(evaluation: Evaluation, ax: Axes, *, precision: bool, band: bool, asked: str) -> None:
    rows = evaluation.rows
    problems = _problems(rows, asked)
    make = average_precision_statistic if precision else auc_statistic
    weight = np.ones(len(rows)) if rows.weight is None else rows.weight
    areas = [float(make(up, s)(weight[None])[0]) for _, up, s in problems]
    chosen = list(range(len(problems)))
    left_out = ""
    if len(chosen) > MOST_LINES:
        by_area = sorted(chosen, key=lambda i: areas[i])
        chosen = by_area[: MOST_LINES // 2] + by_area[-(MOST_LINES // 2) :]
        left_out = f",\n{MOST_LINES // 2} lowest and {MOST_LINES // 2} highest of {len(problems)}"
    grid = np.linspace(0, 1, 101)
    before = len(ax.lines)
    for place, i in enumerate(chosen):
        name, up, scores = problems[i]
        colour = COLOURS[place % len(COLOURS)]
        curve: Curve = precision_recall_curve(up, scores, weight) if precision else roc_curve(up, scores, weight)
        style = DASHES[place % len(DASHES)]
        drawstyle = "steps-pre" if precision else "default"
        label = f"{_short(name)}: {areas[i]:.3f}"
        ax.plot(curve.x, curve.y, color=colour, linestyle=style, linewidth=1.6, drawstyle=drawstyle, label=label)
        if band and len(problems) <= 3:
            low, high = _band(rows, up, scores, precision=precision, level=evaluation.uncertainty.level, grid=grid)
            ax.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    if precision and len(problems) == 1:
        share = float(weight[problems[0][1]].sum() / weight.sum())
        ax.axhline(share, color=GREY, linewidth=0.8, linestyle=":")
        ax.annotate("chance", (0.01, share), ha="left", va="bottom", fontsize="small", color=GREY)
    if not precision:
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.02)
    _grid(ax)
    ax.legend(
        title=("average precision" if precision else "area") + left_out,
        loc=_empty_corner(ax.lines[before : before + len(chosen)]),
        fontsize="small",
        title_fontsize="small",
        frameon=True,
        framealpha=0.9,
        edgecolor="none",
    )


def roc(evaluation: Evaluation, ax: Axes | None = None, *, band: bool = True) -> Axes:
    """Draws the ROC curve, one line a class against the rest.

    Args:
        evaluation: Of a classifier.
        ax: Axes to draw on.
        band: Whether to shade the pointwise bootstrap interval, for up to three lines.
    """
    axes = _axes(ax)
    _curves(evaluation, axes, precision=False, band=band, asked="Drawing a ROC curve.")
    axes.set_aspect("equal")
    _dress(axes, x="false positive rate", y="true positive rate", title="ROC curve")
    return axes


def precision_recall(evaluation: Evaluation, ax: Axes | None = None, *, band: bool = True) -> Axes:
    """Draws precision against recall, one line a class against the rest.

    Args:
        evaluation: Of a classifier.
        ax: Axes to draw on.
        band: Whether to shade the pointwise bootstrap interval, for up to three lines.
    """
    axes = _axes(ax)
    _curves(evaluation, axes, precision=True, band=band, asked="Drawing a precision-recall curve.")
    _dress(axes, x="recall", y="precision", title="Precision and recall")
    return axes


def confusion(evaluation: Evaluation, ax: Axes | None = None, *, shares: bool = True) -> Axes:
    """Draws the confusion matrix: labels down, predictions across.

    Args:
        evaluation: Of a classifier of classes that exclude each other.
        ax: Axes to draw on.
        shares: Colour by share of the label's rows, instead of by count.
    """
    matrix = evaluation.confusion()
    k = len(matrix.classes)
    axes = _axes(ax, width=min(3.8 + 0.45 * k, 11), height=min(2.6 + 0.42 * k, 10))
    shown = np.nan_to_num(matrix.shares) if shares else matrix.counts
    most = 1.0 if shares else float(shown.max()) or 1.0
    picture = axes.imshow(shown, cmap="Blues", vmin=0, vmax=most)
    if k <= 15:
        for (i, j), share in np.ndenumerate(shown):
            colour = "white" if share > 0.55 * most else "#222222"
            size = "small" if k <= 10 else "x-small"
            axes.text(j, i, f"{matrix.counts[i, j]:g}", ha="center", va="center", color=colour, fontsize=size)
    step = -(-k // min(_room(axes, points=11), _room(axes, points=11, down=False)))
    names = [_short(name) for name in matrix.classes]
    ticks = range(0, k, step)
    turned = k > 3
    axes.set_xticks(ticks, [names[i] for i in ticks], fontsize="small")
    axes.tick_params(axis="x", rotation=45 if turned else 0)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if turned else "center")
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize="small")
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("share of the label's rows" if shares else "rows", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title("Confusion", fontsize="medium", loc="left")
    return axes


def reliability(evaluation: Evaluation, ax: Axes | None = None, *, bins: int = 15, equal_mass: bool = False) -> Axes:
    """Draws the share that is right against confidence, with 95% intervals; the size of a dot is the number of rows.

    Args:
        evaluation: Of a classifier.
        ax: Axes to draw on.
        bins: How many.
        equal_mass: Bins of equally many rows instead of equal width.
    """
    axes = _axes(ax)
    found = evaluation.reliability(bins=bins, equal_mass=equal_mass)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="calibrated")
    axes.vlines(found.confidence, found.low, found.high, color=COLOURS[0], alpha=0.5, linewidth=1.4)
    size = 15 + 150 * found.count / found.count.max()
    axes.scatter(found.confidence, found.accuracy, s=size, color=COLOURS[0], zorder=3, edgecolor="white", linewidth=0.6)
    axes.plot(found.confidence, found.accuracy, color=COLOURS[0], linewidth=1, alpha=0.7)
    axes.set_xlim(-0.02, 1.04)
    axes.set_ylim(-0.02, 1.04)
    axes.set_aspect("equal")
    _grid(axes)
    several = evaluation.rows.kind == "multilabel"
    _dress(
        axes,
        x="probability given" if several else "confidence",
        y="share that has the label" if several else "share that is right",
        title=f"Reliability (calibration error {found.error:.3f})",
    )
    return axes


def per_class(evaluation: Evaluation, ax: Axes | None = None, *, metric: str = "f1", most: int = 30) -> Axes:
    """Draws a bar for each class with its interval, the lowest at the top.

    Args:
        evaluation: Of a classifier.
        ax: Axes to draw on.
        metric: `"precision"`, `"recall"`, `"f1"` or `"auc"`.
        most: How many classes at most, and no more than there is room for; the lowest are kept.
    """
    figures = evaluation.per_class()
    if metric not in ("precision", "recall", "f1", "auc"):
        raise EvaluationError(f"Drawing {metric} by class.", found="no such figure", fix="take precision, recall, f1 or auc")
    defined = [one for one in figures.values() if np.isfinite(one.values[metric])]
    ordered = sorted(defined, key=lambda one: one.values[metric])[:most]
    if not ordered:
        raise EvaluationError(f"Drawing {metric} by class.", found="no class for which it is defined", fix="use more rows")
    axes = _axes(ax, height=min(1.4 + 0.32 * len(ordered), 11))
    ordered = ordered[: _room(axes, points=9.5)]
    places = np.arange(len(ordered))
    values = np.array([one.values[metric] for one in ordered])
    axes.barh(places, values, color=COLOURS[5], height=min(0.7, 0.15 * len(ordered) + 0.1))
    for place, one in zip(places, ordered, strict=True):
        interval = one.intervals.get(metric)
        if interval is not None:
            axes.hlines(place, interval.low, interval.high, color="#222222", linewidth=1.2)
    axes.set_yticks(places, [f"{_short(one.name)} ({one.rows})" for one in ordered], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    only = f" (the {len(ordered)} lowest of {len(defined)})" if len(ordered) < len(defined) else ""
    shown = {"f1": "F1", "auc": "AUC against the rest"}.get(metric, metric)
    _dress(axes, x=shown, y="", title=f"{shown} by class{only}")
    return axes


def training_curves(history: Any, ax: Axes | None = None, *, metric: str = "loss") -> Axes:
    """Draws a metric over the epochs of a training run, validation dashed, a line where each phase begins.

    Args:
        history: A `Run`, what Keras's `fit` returns, or a mapping from names to values by epoch.
        ax: Axes to draw on.
        metric: Which one; its `val_` twin is drawn too where there is one.
    """
    values: Mapping[str, Sequence[float]] = history if isinstance(history, Mapping) else history.history
    if metric not in values:
        raise EvaluationError(
            f"Drawing {metric} over epochs.", found=f"a history of {', '.join(map(repr, values))}", fix="choose one of them"
        )
    axes = _axes(ax)
    for name, colour, style, label in ((metric, COLOURS[0], "-", "training"), (f"val_{metric}", COLOURS[1], "--", "validation")):
        if name in values:
            line = np.asarray(values[name], dtype=float)
            epochs = np.arange(1, len(line) + 1)
            axes.plot(epochs, line, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=3, label=label)
    phases = [phase for phase in getattr(history, "phases", ()) if phase.epochs]
    total = max(len(values[metric]), sum(phase.epochs for phase in phases))
    axes.set_xlim(0.5, total + 0.5)
    # Some 5 points a letter: names too wide for their phase stand upright beside its beginning.
    fit = all(len(_short(phase.name)) <= _room(axes, points=5, down=False) * phase.epochs / total for phase in phases)
    end = 0
    for phase in phases:
        if end:
            axes.axvline(end + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            _short(phase.name),
            (end + (phase.epochs / 2 if fit else 0) + 0.5, 1),
            xytext=(0, 2) if fit else (2, -3),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            rotation=0 if fit else 90,
            ha="center" if fit else "left",
            va="bottom" if fit else "top",
            fontsize="small",
            color=GREY,
        )
        end += phase.epochs
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    _grid(axes)
    axes.legend(fontsize="small", frameon=False)
    _dress(axes, x="epoch", y=metric, title="")
    axes.set_title("Training", fontsize="medium", loc="left", pad=18 if phases and fit else None)
    return axes


def learning_rate_curve(rates: ArrayLike, losses: ArrayLike, ax: Axes | None = None, *, chosen: float | None = None) -> Axes:
    """Draws the loss against the learning rate, as a learning-rate finder tries them.

    Args:
        rates: Learning rates (n,), positive.
        losses: The loss at each (n,).
        ax: Axes to draw on.
        chosen: A rate to mark.
    """
    x, y = np.asarray(rates, dtype=float), np.asarray(losses, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x) or (x <= 0).any():
        raise EvaluationError(
            "Drawing the loss against the learning rate.",
            found=f"rates of shape {x.shape} (the lowest {x.min() if x.size else None}) and losses of shape {y.shape}",
            fix="give one loss for each positive rate",
        )
    axes = _axes(ax)
    finite = np.isfinite(y)
    axes.plot(x[finite], y[finite], color=COLOURS[0], linewidth=1.6)
    axes.set_xscale("log")
    # Where training diverges the loss would push everything else to the floor of the picture.
    lowest, first = float(y[finite].min()), float(y[finite][0])
    axes.set_ylim(lowest - 0.1 * (first - lowest or 1), first + 0.8 * (first - lowest or 1))
    if chosen is not None:
        axes.axvline(chosen, color=COLOURS[1], linestyle="--", linewidth=1.2)
        at = ("data", "axes fraction")
        axes.annotate(f" {chosen:.2g}", (chosen, 1), xycoords=at, va="top", color=COLOURS[1], fontsize="small")
    _grid(axes)
    _dress(axes, x="learning rate", y="loss", title="Learning-rate finder")
    return axes
