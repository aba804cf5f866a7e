"""What the dashboard costs by itself: processor seconds of its server and of the worker while one tab is open.

    python -m tests.benchmarks.own_cost [--idle 30] [--busy 20] [--workload burst-32] [--json FILE]

The browser is left out: it runs on the operator's machine. While a run is on, what computes is left out too: of the
worker's threads those that did at least a tenth of its work are the engine's (the stepping thread and the kernels'
threads), all others serve, sample and watch. The stepping thread also builds the status, asked for once a second; that
is not told apart (the whole answer, HTTP included, takes 2 ms: at most 0.2 %).

The bars: one idle tab at most 2 % of a core, a run at most 10 % beyond the run itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.dashboard import Dashboard, chromium_path, running_dashboard
from tests.e2e.steps import ask, open_page, run_workload, set_number, wait_ready

PAGES = ("Live", "Plan", "Compare", "History")
IDLE_BAR, BUSY_BAR = 2.0, 10.0
_ENGINE_SHARE = 0.1
_SETTLE_S = 15.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time in percent of one core over a stretch of wall time.

    Attributes:
        what: the page, and what went on.
        seconds: wall time.
        dashboard, worker: percent of a core; the worker's without what computes.
    """

    what: str
    seconds: float
    dashboard: float
    worker: float

    @property
    def total(self) -> float:
        """Both together, percent of a core."""
        return self.dashboard + self.worker


@dataclass(frozen=True, slots=True)
class Reading:
    """Processor seconds of a process so far: all of it (threads that have ended too), and by thread that lives."""

    total: float
    threads: dict[int, float]


def reading(process: psutil.Process) -> Reading:
    """What a process has used until now."""
    times = process.cpu_times()
    threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    return Reading(times.user + times.system, threads)


def spent(before: Reading, after: Reading, *, busy: bool = False) -> float:
    """Processor seconds between two readings; without those of the threads that compute if ``busy``.

    >>> round(spent(Reading(1.0, {1: 0.5, 2: 0.5}), Reading(11.0, {1: 9.5, 2: 0.75}), busy=True), 2)
    1.0
    """
    total = after.total - before.total
    threads = (seconds - before.threads.get(thread, 0.0) for thread, seconds in after.threads.items())
    return total - sum(seconds for seconds in threads if busy and seconds >= _ENGINE_SHARE * total)


def measure(dashboard: Dashboard, page: Page, what: str, seconds: float, *, busy: bool = False) -> Cost:
    """Let the tab stand open for so long and count."""
    server, worker = psutil.Process(dashboard.process.pid), dashboard.worker()
    begun, before = time.monotonic(), (reading(server), reading(worker))
    page.wait_for_timeout(1000 * seconds)
    after, elapsed = (reading(server), reading(worker)), time.monotonic() - begun
    used = spent(before[0], after[0]), spent(before[1], after[1], busy=busy)
    return Cost(what, round(elapsed, 1), *(round(100 * part / elapsed, 2) for part in used))


def costs(dashboard: Dashboard, browser: Browser, idle_s: float, busy_s: float, workload: str) -> list[Cost]:
    """Every page idle, then Live while a recorded run is on, then while an answer streams."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    page.wait_for_timeout(1000 * _SETTLE_S)  # what an engine prepares when it has nothing else to do
    found = [measure(dashboard, page, "no request yet: Live", idle_s)]
    run_workload(page, "quick")
    expect(page.get_by_text("recorded", exact=True).first).to_be_visible(timeout=240_000)
    for name in PAGES:
        open_page(page, name)
        page.wait_for_timeout(5000)
        found.append(measure(dashboard, page, f"idle: {name}", idle_s))
    open_page(page, "Live")
    run_workload(page, workload)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    page.wait_for_timeout(2000)
    found.append(measure(dashboard, page, f"{workload} is on: Live", busy_s, busy=True))
    assert page.get_by_role("button", name="Cancel").is_visible(), "the run ended early: choose a longer workload"
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Run and record")).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Sampling").click()
    set_number(page, "Max tokens", 6000)
    page.keyboard.press("Escape")
    ask(page, "Write a long story about a lighthouse keeper and the sea.")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.wait_for_timeout(2000)
    found.append(measure(dashboard, page, "an answer is on: Live", busy_s, busy=True))
    page.close()
    return found


def report(found: Sequence[Cost]) -> str:
    """A table, and whether the bars are kept."""
    lines = [f"{'percent of a core':<32}{'dashboard':>10}{'worker':>10}{'together':>10}{'bar':>8}"]
    for cost in found:
        bar = BUSY_BAR if " is on" in cost.what else IDLE_BAR
        kept = "" if cost.total <= bar else "  missed"
        lines.append(f"{cost.what:<32}{cost.dashboard:>10.2f}{cost.worker:>10.2f}{cost.total:>10.2f}{bar:>8.0f}{kept}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds that each page stands idle")
    parser.add_argument("--busy", type=float, default=20.0, help="seconds of the run that are measured")
    parser.add_argument("--workload", default="burst-32", help="of the run; it must last longer than that")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_dashboard(Path(folder) / "home") as dashboard,
        sync_playwright() as playwright,
    ):
        expect.set_options(timeout=120_000)
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=flags)
        found = costs(dashboard, browser, arguments.idle, arguments.busy, arguments.workload)
        browser.close()
    print(report(found))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in found], indent=1))


if __name__ == "__main__":
    main()
