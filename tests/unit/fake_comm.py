"""A communicator without MPI."""

from types import SimpleNamespace


class Comm:
    """A communicator of ranks that are threads: the n-th collective of each is the same one."""

    def __init__(self, rank, size, arrived):
        self.rank, self.size, self._arrived, self._count = rank, size, arrived, 0

    def _collective(self, name, data, out):
        number, self._count = self._count, self._count + 1
        everybody = self._arrived.setdefault(number, {})
        everybody[self.rank] = (name, data)

        def test():
            if len(everybody) < self.size:
                return False
            assert {name for name, _ in everybody.values()} == {name}
            if out is not None:
                out[:] = [everybody[rank][1] for rank in range(self.size)]
            return True

        return SimpleNamespace(Test=test)

    def Idup(self):
        return self, self._collective("dup", None, None)

    def Ibarrier(self):
        return self._collective("barrier", None, None)

    def Iallgather(self, mine, everybody):
        return self._collective("gather", mine.copy(), everybody)

    def Free(self):
        pass
