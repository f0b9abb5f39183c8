"""A progress bar over steps."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

INTERVAL = 0.1  # seconds between changes of a bar: one takes longer than a short step


@contextlib.contextmanager
def progress_bar(
    what: str, total: int, show: bool | None, *, unit: str = "steps"
) -> Iterator[Callable[..., None]]:
    """Show a progress bar in a terminal: steps, loss, steps per second, time left.

    Args:
        what: is done.
        total: how many steps there are.
        show: whether to show it; None where there is a terminal.
        unit: what is counted, if not steps.
    """
    console = rich.console.Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield lambda steps, loss=None: None
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, loss="", speed="")

        waiting, shown, last = 0, time.monotonic(), None

        def show_them() -> None:
            nonlocal waiting, shown
            bar.update(task, advance=waiting)
            speed = bar.tasks[0].speed
            bar.update(task, speed=f"{speed:,.0f} {unit}/s" if speed else "")
            if last is not None:
                bar.update(task, loss=f"loss {last:.4g}")
            waiting, shown = 0, time.monotonic()

        def report(steps: int, loss: float | None = None) -> None:
            nonlocal waiting, last
            waiting, last = waiting + steps, last if loss is None else loss
            if time.monotonic() - shown > INTERVAL:
                show_them()

        try:
            yield report
        finally:
            show_them()
