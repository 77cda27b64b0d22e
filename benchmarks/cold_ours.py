"""What a user's script does: load a model, draw curves. ``cold_ours.py MODEL N THREADS``"""

import sys

import fastdiff as fd

path, n, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = fd.load(path, backend=fd.get_backend("cpu", threads=threads))
curves = model.sample(n)
print(curves.shape)
