"""What a person sees while a study runs: one bar for all of it, one for each run at work, and a line for each finished one."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deltatune.study.plan import Entry, Plan
from deltatune.study.store import Found

if TYPE_CHECKING:
    from rich.progress import TaskID

# The remaining time is estimated over this many seconds, because runs of different methods differ in speed.
ESTIMATE_OVER = 600.0


class Display:
    """A live view of a study; on something that is not a terminal only the finished runs are printed."""

    def __init__(self, plan: Plan) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.total = len(plan.search_runs()) + sum(1 for _ in plan.cells())
        self.over = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=ESTIMATE_OVER,
        )
        self.bars: dict[Entry, TaskID] = {}
        self.seen: dict[Entry, int] = {}
        self.overall = self.progress.add_task(plan.name, total=plan.total_steps())

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, entry: Entry) -> None:
        """Show a run that a worker has taken up."""
        self.seen.setdefault(entry, 0)
        self.bars[entry] = self.progress.add_task(f"  {_title(entry)}", total=entry.run.recipe.steps)

    def step(self, entry: Entry, step: int) -> None:
        """Move the bars to the step that a run has reached."""
        self.progress.update(self.bars[entry], completed=step)
        self._advance(entry, step)

    def end(self, entry: Entry) -> None:
        """Take the bar of a run away."""
        self.progress.remove_task(self.bars.pop(entry))

    def settle(self, entry: Entry, found: Found) -> None:
        """Count a run as over; print its score when it was not over before this command."""
        new = entry in self.seen
        self._advance(entry, entry.run.recipe.steps)
        self.over += 1
        self.progress.update(self.overall, description=f"{self.over} of {self.total} runs")
        if new and found.result:
            scores = f"dev {found.result['dev']:.1f}" + _test(found.result["test"], entry)
            self.say(f"{found.id}  {_title(entry)}  {scores}  {found.result['seconds']['total']:.0f} s")
        elif found.failure:
            self.say(f"{found.id}  {_title(entry)}  failed: {_reason(found.failure)}", "red")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bars."""
        self.progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, entry: Entry, step: int) -> None:
        before = self.seen.get(entry, 0)
        self.seen[entry] = max(before, step)
        self.progress.advance(self.overall, max(0, step - before))


def _test(score: float | None, entry: Entry) -> str:
    return "" if score is None or entry.part == "search" else f"  test {score:.1f}"


def _reason(failure: Mapping[str, Any]) -> str:
    return f"{failure['error']}: {failure['message']}"


def _title(entry: Entry) -> str:
    run = entry.run
    rate = f" lr {run.recipe.lr:g}" if entry.part == "search" else ""
    return f"{entry.method} on {run.task}, {run.backbone}, seed {run.seed}{rate}"
