"""How far a bulk run is, as a bar on the terminal: rate, done, failed, and the time left once that is known."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from blip2.bulk.database import BulkError
from blip2.bulk.run import Progress
from blip2.bulk.sources import ImageItem


@contextlib.contextmanager
def progress_bar(
    inputs: Iterable[ImageItem] | None, *, hidden: bool = False, leave: bool = True
) -> Iterator[Callable[[Progress], None]]:
    """Gives the function that shows the progress of a run; hidden: it does nothing.

    Args:
        inputs: listed a second time, to count them beside the run; None: no time left is shown.
    """
    if hidden:
        yield lambda progress: None
        return
    expected: list[int] = []

    def count(inputs: Iterable[ImageItem]) -> None:
        with contextlib.suppress(BulkError):  # the run itself reports what is wrong
            expected.append(sum(1 for _ in inputs))

    if inputs is not None:
        threading.Thread(target=count, args=(inputs,), daemon=True).start()
    with tqdm(unit=" images", mininterval=1, leave=leave) as bar:

        def show(progress: Progress) -> None:
            if expected:
                bar.total = max(expected[0] - progress.before, progress.done)
            bar.set_postfix(failed=progress.failed, before=progress.before, refresh=False)
            bar.update(progress.done - bar.n)

        yield show
