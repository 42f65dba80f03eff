"""The one evaluation harness: tasks x rows -> JSON -> tables and pictures. ``python -m pudnet.evaluation`` runs it.

``tasks.py`` says what is classified, ``rows.py`` how; ``harness.py`` runs every row on every task, ``tables.py``
renders. Public parts: the baselines ``random_weights`` and ``pca_weights``, and ``train_from_scratch``.
"""

from __future__ import annotations

from pudnet.evaluation.baselines import pca_weights, random_weights
from pudnet.evaluation.scratch import ScratchResult, train_from_scratch

__all__ = ["ScratchResult", "pca_weights", "random_weights", "train_from_scratch"]
