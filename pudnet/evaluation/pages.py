"""Parts of Markdown pages that a command writes; what is around them is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pudnet.errors import InputError, message
from pudnet.files import atomic_path

WHERE = "evaluation.pages"


def write_section(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between the markers of section ``name``.

    The page has two lines ``<!-- name: generated ... -->`` and ``<!-- name: end -->``, in this order.

    Raises:
        InputError: the page or one of its markers is missing.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise InputError(message(WHERE, "page", "a readable file", f"{str(page)!r} ({error.strerror})")) from error
    before, begin, rest = text.partition(f"<!-- {name}: generated")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        rule = f"a page with the markers '<!-- {name}: generated ... -->' and '<!-- {name}: end -->'"
        raise InputError(message(WHERE, "page", rule, repr(str(page))))
    head = rest.partition("\n")[0]  # the rest of the first marker's line
    with atomic_path(page, WHERE) as temporary:
        temporary.write_text("\n".join([f"{before}{begin}{head}", "", *lines, "", f"{end}{after}"]))
