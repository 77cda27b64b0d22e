"""Ranks that are threads of this process: a communicator as that of mpi4py, and a function that runs one on each."""

import threading
from queue import Empty, SimpleQueue

import numpy as np

SECONDS = 40


class Comm:
    """The communicator of one thread; all share `board`."""

    def __init__(self, rank, size, board):
        self.rank, self.size, self.board = rank, size, board

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Isend(self, array, dest):
        self.board["mail"][self.rank, dest].put(np.array(array))
        return Request(lambda: True)

    def Irecv(self, array, source):
        def arrived():
            try:
                message = self.board["mail"][source, self.rank].get_nowait()
            except Empty:
                if self.board["barrier"].broken:
                    raise SystemExit(1) from None  # as a launcher ends processes
                return False
            assert message.shape == array.shape
            assert message.dtype == array.dtype
            array[...] = message
            return True

        return Request(arrived)

    def allgather(self, value):
        self.board["said"][self.rank] = value
        self.board["barrier"].wait(SECONDS)
        said = list(self.board["said"])
        self.board["barrier"].wait(SECONDS)
        return said

    def bcast(self, value, root):
        return self.allgather(value)[root]

    def Abort(self, code):
        self.board["barrier"].abort()
        raise SystemExit(code)


class Request:
    def __init__(self, arrived):
        self.arrived = arrived

    def Test(self):
        return self.arrived()


def on_ranks(size, work):
    """Call ``work(comm)`` in so many threads; return what each returned or raised."""
    mail = {(a, b): SimpleQueue() for a in range(size) for b in range(size)}
    board = {"mail": mail, "said": [None] * size, "barrier": threading.Barrier(size)}
    found = [None] * size

    def run(rank):
        try:
            found[rank] = work(Comm(rank, size, board))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    return found
