"""Samples, draws and scores beyond one process: chunk by chunk into a Zarr array, on many workers, to the same bits.

Sample k of a seed has the same bits on any worker and in any batch, so drawing is a map over rows: a chunk of the array
is a task, which nobody waits for and nothing locks. Beside every chunk lies a mark that it is done, so that the same
call goes on where an earlier one stopped, however that ended.

::

    array = fd.scale.sample_to("samples.zarr", model, 10_000_000, chunk=100_000, client=8)
    (array[5:9] == model.sample(4, first_sample=5)).all()  # True

`client` is who does the work:

==================================  ====================================================================================
None                                this process
int                                 so many processes of this machine; one that dies is replaced, and costs its chunk
``dask.distributed.Client``         the workers of a cluster; also its address, as "tcp://host:8786"
``joblib.Parallel``                 its workers; it must be made with ``return_as="generator_unordered"``
``concurrent.futures.Executor``     its workers; after one has died, as a rule, it takes no more work
==================================  ====================================================================================

A worker computes on the backend that the model has here, on a CPU with one thread, so that k workers use k cores. Which
GPU it uses is the engine's affair, as a rule by CUDA_VISIBLE_DEVICES, which dask-cuda sets. Weights travel once to each
worker, and kernels are compiled once on each machine.
"""

from fastdiff.scale.calls import impute_to, sample_to, score_to
from fastdiff.scale.store import Contents, check, chunk_of

__all__ = ["Contents", "check", "chunk_of", "impute_to", "sample_to", "score_to"]
