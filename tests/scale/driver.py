"""Draws into a store, as a program that can be killed: STORE MODEL WORKERS."""

import sys

import fastdiff as fd

ROWS, CHUNK, SEED = 120_000, 3_000, 5

if __name__ == "__main__":
    store, model, workers = sys.argv[1:]
    fd.scale.sample_to(store, fd.load(model), ROWS, chunk=CHUNK, seed=SEED, client=int(workers), progress=False)
