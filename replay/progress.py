"""A progress bar over steps."""

import contextlib
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


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
    if show is None:
        show = console.is_terminal
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, disable=not show) as bar:
        task = bar.add_task(what, total=total, loss="", speed="")

        def report(steps: int, loss: float | None = None) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=steps, speed=f"{speed:,.0f} {unit}/s" if speed else "")
            if loss is not None:
                bar.update(task, loss=f"loss {loss:.4g}")

        yield report
