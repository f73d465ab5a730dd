"""Work on several processes, of which one may be killed: by the system, if it takes too much memory."""

from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context


class Processes:
    """So many processes, started by `how`, until the `with` ends."""

    def __init__(self, count, how):
        self._pool = ProcessPoolExecutor(count, mp_context=get_context(how))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def each(self, function, arguments):
        """The function's values, as they come.

        Raises:
            RuntimeError: a process died, so that what it was at would never come.
        """
        try:
            for future in as_completed([self._pool.submit(function, argument) for argument in arguments]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"a process died, for want of memory perhaps: {error}") from error
