"""Work in a process of its own that may be killed or hindered: what the parts about faults share."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pudnet.errors import PudnetError
from pudnet.models.pudnet import PudNet

TINY = {"sketch_size": 8, "layers": 1, "width": 4, "generator_width": 1}
NOBODY = 65534
DONE, REFUSED, BROKEN = 0, 3, 4  # how work ended: well, with an error of pudnet, with any other


def tiny_net(seed: int = 0) -> PudNet:
    return PudNet("convnet3", image_size=8, seed=seed, **TINY)


def start(work: Callable[[], object], log: Path) -> int:
    """Fork a process that does ``work``, its output to ``log``; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = DONE
    except PudnetError as error:
        code = REFUSED
        _say(str(error))
    except BaseException:
        _say(traceback.format_exc())
    finally:
        os._exit(code)


def _say(text: str) -> None:
    with suppress(OSError):  # the disk may be full for this as well
        os.write(2, text.encode(errors="replace"))


def wait(child: int) -> int:
    """How the process ended: one of the codes above, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float, begun: Callable[[], bool] = lambda: True) -> int:
    """Kill the process so long after ``begun``, unless it ends before; returns how it ended."""
    end = None
    while end is None or time.monotonic() < end:
        if end is None and begun():
            end = time.monotonic() + seconds
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.01, seconds / 4))
    os.kill(child, signal.SIGKILL)  # it is not waited for yet, so its id is still its own
    return wait(child)


def give_up_rights() -> None:
    """Become a user whom file modes stop, where this one is root."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def temporaries(folder: Path) -> list[Path]:
    """What is hidden in a folder: all that writers that were killed may leave, ours or a library's own."""
    return [path for path in folder.iterdir() if path.name.startswith(".")]
