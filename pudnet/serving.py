"""What many requests to one predictor need: a way to stop, threads that do not disturb each other, memory in parts."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

from pudnet.data.source import items_of
from pudnet.errors import Cancelled, DatasetErrors

Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = TypeVar("Batch", torch.Tensor, list[Any])

POLL_SECONDS = 0.1  # how often a cancellation is looked for while all threads are busy


class Token(Protocol):
    """Says whether to stop: ``threading.Event``, ``multiprocessing.Event`` or anything with their ``is_set``."""

    def is_set(self) -> bool:
        """True from the moment on when the work should end."""


class AnyToken:
    """Set as soon as one of several tokens is, or when ``seconds`` are over."""

    def __init__(self, *tokens: Token | None, seconds: float | None = None) -> None:
        self._tokens = [token for token in tokens if token is not None]
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def is_set(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or any(token.is_set() for token in self._tokens)


def check(token: Token | None, where: str) -> None:
    """Raise Cancelled where ``token`` is set."""
    if token is not None and token.is_set():
        raise Cancelled(f"{where}: cancelled, or out of time.")


@contextmanager
def stop_request() -> Iterator[Token]:
    """Within the block SIGINT and SIGTERM set the token, so that no step is cut in half. Only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def in_threads(
    run: Callable[[Item, Token], Result],
    items: Sequence[Item],
    workers: int,
    *,
    where: str,
    timeout: float | None = None,
    cancel: Token | None = None,
    on_result: Callable[[int, Result | Exception], None] | None = None,
) -> list[Result | Exception]:
    """``run(item, token)`` of every item, each in one of ``workers`` threads; what one raises becomes its result.

    Args:
        where: who asks, for the messages.
        timeout: seconds after which an item's token is set.
        cancel: once set, no further item is begun, and those that run see it in their tokens.
        on_result: called in this thread with (position, result) as each is ready.

    Raises:
        Cancelled: ``cancel`` was set before all items were done.
        BaseException: what ``on_result`` raises, or KeyboardInterrupt; what still runs is told to stop first.
    """
    stop = threading.Event()
    found: dict[int, Result | Exception] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="pudnet") as pool:
        try:
            waiting: dict[Future[Result], int] = {}
            ahead = iter(enumerate(items))
            while len(found) < len(items):
                check(cancel, where)
                # Only as many as there are threads: the time of what waits has not begun.
                for number, item in islice(ahead, workers - len(waiting)):
                    waiting[pool.submit(run, item, AnyToken(cancel, stop, seconds=timeout))] = number
                for future in wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(future)
                    found[number] = result = _outcome(future)
                    if isinstance(result, Cancelled):
                        check(cancel, where)
                    if on_result is not None:
                        on_result(number, result)
        finally:
            stop.set()
    return [found[number] for number in range(len(items))]


def attempt(run: Callable[..., Result], *arguments: Any) -> Result | Exception:
    """``run(*arguments)``, or the error it raises; a cancellation goes on."""
    try:
        return run(*arguments)
    except Cancelled:
        raise
    except Exception as error:
        return error


def all_or_errors(where: str, results: list[Result | Exception]) -> list[Result]:
    """The results, if none is an error.

    Raises:
        DatasetErrors: some are. They let go of what the failed calls held.
    """
    errors: list[Exception] = []
    for number, result in enumerate(results):
        if isinstance(result, Exception):
            result.add_note(f"in dataset {number} of {len(results)}, counted from 0")
            traceback.clear_frames(result.__traceback__)
            errors.append(result)
    if errors:
        raise DatasetErrors(f"{where}: {len(errors)} of {len(results)} datasets failed", errors, results)
    return [result for result in results if not isinstance(result, Exception)]


class Watched:
    """An iterable or map-style dataset that calls ``check`` before each item; ``dataset`` is the original."""

    def __init__(self, dataset: Any, check: Callable[[], None]) -> None:
        self.dataset = dataset
        self._check = check

    def __iter__(self) -> Iterator[Any]:
        for item in items_of(self.dataset):
            self._check()
            yield item


def _outcome(future: Future[Result]) -> Result | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception):
        raise error
    return error


class Halves:
    """Runs batches in halves, quarters and so on where memory runs out.

    Args:
        allowed: False where a part of a batch would give other results.

    Attributes:
        limit: the most items a batch had since memory ran out; None while it never did.
    """

    def __init__(self, allowed: bool = True) -> None:
        self.limit: int | None = None
        self._allowed = allowed

    def run(self, function: Callable[[Batch], Result], batch: Batch) -> Iterator[tuple[Result, int]]:
        """``(function(part), length of the part)`` for the whole batch, or for the parts that memory allows, in order.

        Raises:
            Exception: what ``function`` raises for another reason, or for a batch of one.
        """
        pending = [batch]
        while pending:
            part = pending.pop()
            if self.limit is None or len(part) <= self.limit:
                try:
                    result = function(part)
                except Exception as error:
                    if not self._allowed or len(part) == 1 or not is_out_of_memory(error):
                        raise
                    self.limit = len(part) // 2
                else:
                    yield result, len(part)
                    continue
                # Out of the except clause: the error no longer holds what the failed call had allocated.
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            middle = len(part) // 2
            pending += [part[middle:], part[:middle]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the CPU's or a GPU's memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
