"""``pudnet report``: one self-contained HTML page about a predicted model.

``measure.py`` looks at the model on labelled images, ``embedding_map.py`` at its dataset among others, ``charts.py``
draws, and ``page.py`` puts everything on the page (``page.html``).
"""

from __future__ import annotations

from pudnet.report.page import write_report

__all__ = ["write_report"]
