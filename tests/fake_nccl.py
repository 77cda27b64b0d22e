"""A stand-in for cupy.cuda.nccl on the host run, whose memory the ranks exchange by their communicator.

It has the signatures of CuPy, and refuses what NCCL would: another number of ranks, another identity, buffers of other
sizes or types. `fails` names the call that fails on this rank.
"""

from __future__ import annotations

import ctypes

NCCL_UNIQUE_ID_BYTES = 128
SIZES = {7: 4, 8: 8}  # bytes of a value, by type


class NcclError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"NCCL_ERROR_SYSTEM_ERROR: status {status}")


class FakeNccl:
    """What `fastdiff.ranks` uses of the module."""

    available, NcclError = True, NcclError
    NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8

    def __init__(self, comm, fails=""):
        self.comm, self.fails, self.calls = comm, fails, []

    def get_unique_id(self):
        return tuple(range(-64, NCCL_UNIQUE_ID_BYTES - 64))

    def NcclCommunicator(self, ndev, commId, rank):
        return Communicator(self, ndev, commId, rank)

    def done(self, call, *what):
        """What all ranks say of a call that each makes."""
        if self.fails == call:
            raise NcclError(2)
        self.calls.append(call)
        return self.comm.allgather((call, *what))


class Communicator:
    def __init__(self, nccl, ndev, commId, rank):
        assert (ndev, rank) == (nccl.comm.Get_size(), nccl.comm.Get_rank())
        assert len(commId) == NCCL_UNIQUE_ID_BYTES
        self.nccl = nccl
        assert set(nccl.done("init", commId)) == {("init", commId)}

    def check_async_error(self):
        if self.nccl.fails == "later" and len(self.nccl.calls) > 3:
            raise NcclError(1)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        assert all(isinstance(each, int) for each in (sendbuf, recvbuf, count, datatype, stream))
        size = count * SIZES[datatype]
        found = self.nccl.done("allGather", count, datatype, ctypes.string_at(sendbuf, size))
        assert {each[:3] for each in found} == {("allGather", count, datatype)}
        for rank, (*_, values) in enumerate(found):
            ctypes.memmove(recvbuf + rank * size, values, size)
