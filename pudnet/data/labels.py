"""From labels as users have them to int64 positions in a tuple of class names.

The rule: with class names an integer label is a position in them and a string label is one of them. Without names the
classes are the distinct labels, sorted (integers by value, strings by code point), and their names are ``str(label)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pudnet.data.base import WHERE, quoted
from pudnet.errors import DtypeError, InputError, ShapeError, message

Array = np.ndarray[Any, Any]


def label_array(labels: Any, argument: str = "labels") -> Array:
    """Check labels and give them as an array [n], int64 or str.

    Raises:
        ShapeError: not one label per image.
        DtypeError: neither integers nor strings.
        InputError: an integer below 0.
    """
    rule = "integers (0 or more) or strings"
    array: Array
    if isinstance(labels, Tensor):
        array = (labels.detach().float() if labels.is_floating_point() else labels.detach()).cpu().numpy()
    elif isinstance(labels, np.ndarray):
        array = labels
    elif isinstance(labels, str) or not hasattr(labels, "__iter__"):
        raise ShapeError(message(WHERE, argument, "one value per image", repr(labels)))
    else:
        values = [_plain(label) for label in labels]
        if len({isinstance(label, str) for label in values}) > 1:  # numpy would turn the numbers into strings
            raise DtypeError(message(WHERE, argument, rule, "a mixture of strings and others"))
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ShapeError(message(WHERE, argument, "one value per image", "lists of several lengths")) from error
    if array.ndim != 1:
        hint = "Turn one-hot rows into integers with argmax(1), a column into a row with reshape(-1)."
        raise ShapeError(message(WHERE, argument, "[n], one value per image", list(array.shape), hint))
    kind = array.dtype.kind
    if kind in "US" or (kind in "OT" and all(isinstance(label, str) for label in array)):
        array = np.char.decode(array, "utf-8") if kind == "S" else array.astype(np.str_)
        return array
    if kind not in "iub" and len(array):
        hint = "Convert whole numbers with astype('int64')." if kind == "f" else ""
        raise DtypeError(message(WHERE, argument, rule, array.dtype, hint))
    array = array.astype(np.int64)
    if len(array) and array.min() < 0:
        hint = "Leave out images without a label."
        raise InputError(message(WHERE, argument, "integers of at least 0", int(array.min()), hint))
    return array


def _plain(label: Any) -> Any:
    """One label without its tensor or numpy wrapping; what has axes stays an array."""
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    return label.item() if isinstance(label, (np.ndarray, np.generic)) and label.ndim == 0 else label


def distinct_names(
    values: Array, class_names: Sequence[str] | None, argument: str = "labels"
) -> tuple[list[str], Array]:
    """Names of the distinct values (sorted by value), and for each value its position among them [n].

    Raises:
        InputError: an integer is no position in ``class_names``, or a string is none of them.
    """
    distinct, positions = np.unique(values, return_inverse=True)
    if class_names is None:
        return [str(value) for value in distinct], positions
    if values.dtype.kind == "U":
        strange = [str(value) for value in distinct if str(value) not in set(class_names)]
        if strange:
            raise InputError(message(WHERE, argument, f"among the {len(class_names)} class names", quoted(strange)))
        return [str(value) for value in distinct], positions
    if len(distinct) and distinct[-1] >= len(class_names):
        rule = f"in 0..{len(class_names) - 1} ({len(class_names)} class names)"
        raise InputError(message(WHERE, argument, rule, int(distinct[-1])))
    return [class_names[value] for value in distinct], positions


def index_labels(
    values: Array, class_names: Sequence[str] | None, classes: Sequence[str] | None, known: Array | None = None
) -> tuple[Tensor, tuple[str, ...], tuple[int, ...]]:
    """Labels as positions in the classes, by the rule at the head of this file.

    Args:
        values: labels [n], int64 or str, as :func:`label_array` gives them.
        class_names: the names that come with the data, if any.
        classes: the names to map to, those of a model; None takes the data's own. Integers without names are positions
            in ``classes``, unless those names are themselves integers.
        known: labels of the training part, when ``values`` are those of the test part.

    Returns:
        Labels int64 [n], class names [K], images per class [K].

    Raises:
        InputError: a label out of range, a repeated class name, or a class not among ``known`` or ``classes``.
    """
    for argument, given in (("class_names", class_names), ("classes", classes)):
        if given is not None and len(set(given)) != len(given):
            twice = sorted({name for name in given if list(given).count(name) > 1})
            raise InputError(message(WHERE, argument, "different from each other", f"more than one {quoted(twice)}"))
    if class_names is None and classes is not None and not any(name.isdecimal() for name in classes):
        class_names = classes if values.dtype.kind != "U" else None
    names, positions = distinct_names(values, class_names)
    own = names
    if known is not None:
        own = distinct_names(known, class_names, "labels of the training part")[0]
        strange = [name for name in names if name not in set(own)]
        if strange:
            rule = "a part of the classes of the training part"
            raise InputError(message(WHERE, "classes of the test part", rule, f"also {quoted(strange)}"))
    target = tuple(classes if classes is not None else class_names if class_names is not None else own)
    place = {name: index for index, name in enumerate(target)}
    strange = [name for name in names if name not in place]
    if strange:
        rule = f"among the model's {len(target)} classes ({quoted(target)})"
        raise InputError(message(WHERE, "classes of the images", rule, f"also {quoted(strange)}"))
    table = np.array([place[name] for name in names], dtype=np.int64)
    labels = table[positions]
    counts = np.bincount(labels, minlength=len(target))
    return torch.from_numpy(labels), target, tuple(counts.tolist())
