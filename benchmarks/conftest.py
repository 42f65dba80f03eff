"""What pytest needs for the benchmarks: one thread, the copy rate, and a JSON file that says where it comes from."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timing import DEVICE, SITTINGS, Copy, Row, environment, measure, sit

from pudnet.memory import keep_freed

cases: dict[str, list[Row]] = {}  # by group
left_out: dict[str, str] = {}
failed: list[str] = []


@pytest.fixture(autouse=True, scope="session")
def freed_memory_is_kept() -> None:
    """As under the command line: how long fresh memory takes depends on what else ran in the process before."""
    keep_freed()


@pytest.fixture(scope="session")
def copy_rate() -> Copy:
    return Copy()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture
def timed(benchmark: Any, copy_rate: Copy, one_thread: None) -> Iterator[Callable[..., None]]:
    """``measure`` for this row, without gradients; the keyword ``group`` and other strings name the row."""

    def run(candidate: Any, reference: Any, *, group: str, backend: str, **options: Any) -> None:
        benchmark.group = group
        benchmark.extra_info["backend"] = backend
        row = measure(benchmark, copy_rate, candidate, None if backend == "reference" else reference, **options)
        if row is None:
            return
        if DEVICE.type == "cpu":
            cases.setdefault(group, []).append(row)
        else:  # what rows hold must leave the GPU
            sit([row])

    with torch.no_grad():
        yield run


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark writes its file
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    try:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            time_cases(session)
    finally:  # what goes wrong here fails the run, but takes no row with it
        result = yield
    return result


def time_cases(session: pytest.Session) -> None:
    """All sittings of all cases that were not timed at once."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    with single_thread(), torch.no_grad():
        for sitting in range(SITTINGS) if cases else ():
            if reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(f"sitting {sitting + 1} of {SITTINGS}")
            for rows in cases.values():
                sit(rows, sitting)


@pytest.fixture(autouse=True, scope="session")
def fresh_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that a first call of torch.compile is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        left_out[report.nodeid.partition("::")[2]] = str(report.longrepr[2]).removeprefix("Skipped: ")  # type: ignore[index]
    elif report.failed:
        failed.append(report.nodeid.partition("::")[2])


if importlib.util.find_spec("pytest_benchmark"):

    @pytest.hookimpl
    def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
        """Keep what a report needs, and say what is missing; a time for each round is not needed by anybody."""
        output_json |= {"environment": environment(), "left_out": left_out, "failed": failed}
        output_json["machine_info"] = {"node": "see environment"}
        for row in output_json["benchmarks"]:
            row["stats"].pop("data", None)
            row.pop("options", None)
