"""What a user of PyTorch and diffusers does: load a model, draw curves. ``cold_peer.py MODEL N THREADS``"""

import sys

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    """The tutorial's network."""

    def __init__(self, points: int, T: int) -> None:
        super().__init__()
        d = points
        self.down = nn.Sequential(nn.Linear(d, 2 * d), nn.LeakyReLU(0.01), nn.Linear(2 * d, 4 * d))
        self.time = nn.Embedding(T, 4 * d)
        self.up = nn.Sequential(nn.Linear(4 * d, 2 * d), nn.LeakyReLU(0.01), nn.Linear(2 * d, d))

    def forward(self, x, t):
        return self.up(self.down(x) + self.time(t))


@torch.no_grad()
def sample(path: str, n: int) -> torch.Tensor:
    """Load the checkpoint and draw n curves."""
    state = load_file(path)
    betas, mean, std = state.pop("betas"), state.pop("mean"), state.pop("std")
    T, points = len(betas), len(state["up.2.bias"])
    net = Net(points, T)
    net.load_state_dict(state)
    scheduler = DDPMScheduler(num_train_timesteps=T, trained_betas=betas.numpy(), clip_sample=False)
    x = torch.randn(n, points)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    return x * std + mean


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(tuple(sample(sys.argv[1], int(sys.argv[2])).shape))
