"""Lines of progress in a framework's log."""

import logging
import time
from collections.abc import Iterable, Iterator

__all__ = ['with_progress']


class _Progress:
    """Batches with a line of progress in the log; can be read several times."""

    def __init__(self, batches: Iterable, logger: logging.Logger, who: str) -> None:
        self.batches, self.logger, self.who = batches, logger, who

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        total = len(self)
        step, start = max(1, total // 10), time.time()
        for i, batch in enumerate(self.batches):
            yield batch
            if (i + 1) % step == 0 or i + 1 == total:
                rate = (time.time() - start) / (i + 1)
                self.logger.info(f'{self.who}: calibration [{i + 1}/{total}] {rate:.2f} s a batch')


def with_progress(batches: Iterable, logger: logging.Logger, who: str) -> Iterable:
    """The batches (a sized iterable), with a line of progress in the log about every tenth of the way.

    Args:
        batches: What to iterate over; as often as ``batches`` can be.
        logger: Where the lines go.
        who: What the lines begin with.
    """
    return _Progress(batches, logger, who)
