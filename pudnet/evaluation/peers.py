"""Classifiers of raw pixels as a user would pick them: scikit-learn's, with its own settings.

n images, F values an image (the normalised pixels), K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pudnet.errors import InputError, ShapeError, message

WHERE = "fit_pixels"
TREES = 100  # scikit-learn's own number
ITERATIONS = 100  # of logistic regression, scikit-learn's own; what has not converged then is used as it is


def fit_pixels(name: str, x: Tensor, labels: Tensor, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Fit a classifier on as many threads as torch has.

    Args:
        name: one of ``CLASSIFIERS``.
        x: ``[n, F]`` float32.
        labels: int64 ``[n]``.
        seed: of the random forest.

    Returns:
        A function ``[m, F] -> [m]``, the labels.

    Raises:
        InputError: an unknown name, or scikit-learn is not installed.
        ShapeError: ``x`` and ``labels`` do not fit together.
    """
    if name not in CLASSIFIERS:
        raise InputError(message(WHERE, "name", f"one of {', '.join(CLASSIFIERS)}", repr(name)))
    if x.dim() != 2 or len(x) != len(labels):
        raise ShapeError(message(WHERE, "x and labels", "[n, F] and [n]", [list(x.shape), list(labels.shape)]))
    try:
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        hint = "Type: pip install scikit-learn"
        raise InputError(message(WHERE, "scikit-learn", "installed", str(error), hint)) from error
    threads = torch.get_num_threads()
    model = CLASSIFIERS[name](seed, threads)
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x.numpy(), labels.numpy())
    return lambda images: torch.from_numpy(model.predict(images.numpy()))


def _mean(seed: int, threads: int) -> Any:
    from sklearn.neighbors import NearestCentroid

    return NearestCentroid()


def _logistic(seed: int, threads: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=ITERATIONS)


def _forest(seed: int, threads: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(TREES, random_state=seed, n_jobs=threads)


CLASSIFIERS: dict[str, Callable[[int, int], Any]] = {"mean": _mean, "logistic": _logistic, "forest": _forest}
