"""Draws into a store, as a program that can be killed: STORE MODEL WORKERS."""

import os
import sys

import fastdiff as fd

KILLS = int(os.environ.get("FASTDIFF_KILLS", "5"))  # that it is to survive: each costs others' time for some chunks
CHUNK, SEED = 3_000, 5
CHUNKS = 8 * KILLS
ROWS = CHUNKS * CHUNK

if __name__ == "__main__":
    store, model, workers = sys.argv[1:]
    fd.scale.sample_to(store, fd.load(model), ROWS, chunk=CHUNK, seed=SEED, client=int(workers), progress=False)
