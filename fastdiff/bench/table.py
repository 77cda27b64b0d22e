"""The table of workloads. It is append-only: a row keeps its name, its sizes and what it does."""

from __future__ import annotations

from fastdiff.bench import arrays, layers
from fastdiff.bench import networks as net
from fastdiff.bench.workload import Workload

CURVE, PICTURE = (50,), (32, 32, 3)

# fmt: off
WORKLOADS: tuple[Workload, ...] = (
    arrays.Normals("normals-48x1000000", "48 M normals, 48 rows", 48, (1_000_000,)),
    arrays.Normals("normals-960000x50", "48 M normals, 960,000 rows", 960_000, (50,)),
    arrays.ForwardNoising("forward-1000000x50", "forward noising, 1,000,000 x 50", 1_000_000, (50,)),
    arrays.SamplerStep("step-64x256x256x3", "DDPM step, 64 x 256 x 256 x 3", 64, (256, 256, 3)),
    net.Chain("chain-tutorial-1", "100-step chain, tutorial MLP, n = 1", 1, CURVE),
    net.Chain("chain-tutorial-1000", "100-step chain, tutorial MLP, n = 1000", 1000, CURVE),
    net.Chain("chain-tutorial-100000", "100-step chain, tutorial MLP, n = 100,000", 100_000, CURVE),
    net.Training("train-tutorial-10", "training step, tutorial MLP, batch 10", 10, CURVE, 1000),
    net.Training("train-tutorial-1000", "training step, tutorial MLP, batch 1000", 1000, CURVE, 200),
    net.Training("train-tutorial-8192", "training step, tutorial MLP, batch 8192", 8192, CURVE, 20),
    net.Chain("chain-default-1", "100-step chain, default MLP, n = 1", 1, CURVE, 1, "default"),
    net.Chain("chain-default-1000", "100-step chain, default MLP, n = 1000", 1000, CURVE, 1, "default"),
    net.Chain("chain-default-100000", "100-step chain, default MLP, n = 100,000", 100_000, CURVE, 1, "default"),
    net.Training("train-default-10", "training step, default MLP, batch 10", 10, CURVE, 1000, "default"),
    net.Training("train-default-1000", "training step, default MLP, batch 1000", 1000, CURVE, 200, "default"),
    net.Training("train-default-8192", "training step, default MLP, batch 8192", 8192, CURVE, 20, "default"),
    arrays.Similarity("similarity-4096x128", "similarity of 4,096 curves of 128 points", 4096, (128,)),
    arrays.Reshape("reshape-1000000x128", "reshaping, 1,000,000 x 128", 1_000_000, (128,)),
    arrays.Standardise("standardise-1000000x128", "reshaping, standardising, 1,000,000 x 128", 1_000_000, (128,)),
    arrays.ShapedNoise("shaped-1000000x128", "shaped noise, 1,000,000 x 128", 1_000_000, (128,)),
    arrays.PosteriorMean("posterior-1000x10000x64", "denoiser of 10,000 x 64 data, 1,000 states", 1000, (64,)),
    net.PicturesTraining("unet-train-16", "training step, U-Net, 32 x 32 x 3, batch 16", 16, PICTURE, 4),
    net.PicturesForward("unet-forward-16", "forward pass, U-Net, 32 x 32 x 3, batch 16", 16, PICTURE),
    net.PicturesSampling("unet-ddim-16", "20 DDIM steps, U-Net, 32 x 32 x 3, n = 16", 16, PICTURE),
    net.PicturesForward("unet-forward-1", "forward pass, U-Net, 32 x 32 x 3, one picture", 1, PICTURE),
    net.PerceptronForward("mlp-tutorial-100000", "forward pass, tutorial MLP, n = 100,000", 100_000, CURVE),
    net.PerceptronForward("mlp-default-100000", "forward pass, default MLP, n = 100,000", 100_000, CURVE, 1, "default"),
    layers.Conv("conv-4x64x64x64", "convolution 3 x 3, 4 x 64 x 64 x 64", 4, (64, 64, 64)),
    layers.Conv("conv-16x32x32x64", "convolution 3 x 3, 16 x 32 x 32 x 64", 16, (32, 32, 64)),
    layers.Conv("conv-16x16x16x128", "convolution 3 x 3, 16 x 16 x 16 x 128", 16, (16, 16, 128)),
    layers.Conv("conv-16x8x8x256", "convolution 3 x 3, 16 x 8 x 8 x 256", 16, (8, 8, 256)),
    layers.ConvBackward("conv-back-16x32x32x64", "its gradients, 16 x 32 x 32 x 64", 16, (32, 32, 64)),
    layers.ConvBackward("conv-back-16x16x16x128", "its gradients, 16 x 16 x 16 x 128", 16, (16, 16, 128)),
    layers.GroupNorm("norm-64x32x32x64", "GroupNorm and SiLU, 64 x 32 x 32 x 64", 64, (32, 32, 64)),
    layers.Attention("attention-16x64x128", "attention, 16 x 64 x 128", 16, (64, 128)),
    layers.Attention("attention-16x256x128", "attention, 16 x 256 x 128", 16, (256, 128)),
    layers.OptimizerStep("adamw-4000000", "AdamW, clipping, average; 4 M parameters", 1, (4_000_000,)),
    net.Save("save-unet", "checkpoint of the U-Net saved, with moments", 1, PICTURE),
    net.Load("load-unet", "checkpoint of the U-Net loaded", 1, PICTURE),
    layers.LayerNorm("layer-norm-64x1024x128", "LayerNorm, 64 x 1024 x 128", 64, (1, 1024, 128)),
    layers.LayerNormBackward("layer-norm-back-64x1024x128", "its gradients, 64 x 1024 x 128", 64, (1, 1024, 128)),
    layers.Gelu("gelu-64x1024x256", "GELU, 64 x 1024 x 256", 64, (1, 1024, 256)),
    net.MemoryChain("chain-memory-tutorial-1000", "100 rows of LMS, tutorial MLP, n = 1000", 1000, CURVE),
    net.ChainGiven("chain-given-tutorial-1000", "10 curves seen at 8 points, 100 draws, 50 rows", 1000, CURVE),
    net.ChainGiven("chain-given-tutorial-100000", "1,000 curves seen at 8 points, 100 draws, 50 rows", 100_000, CURVE),
)
# fmt: on
BY_NAME = {workload.name: workload for workload in WORKLOADS}
# What `fastdiff bench` runs: every sort of work, under a gigabyte, in about a minute.
QUICK = (
    "normals-48x1000000", "forward-1000000x50", "step-64x256x256x3", "similarity-4096x128", "shaped-1000000x128",
    "posterior-1000x10000x64", "mlp-default-100000", "chain-tutorial-1", "chain-default-1000", "train-default-10",
    "train-default-1000", "conv-16x32x32x64", "conv-back-16x32x32x64", "norm-64x32x32x64", "attention-16x256x128",
    "layer-norm-64x1024x128", "layer-norm-back-64x1024x128", "gelu-64x1024x256",
    "unet-forward-16", "unet-train-16", "unet-ddim-16", "adamw-4000000", "save-unet", "load-unet",
)  # fmt: skip
