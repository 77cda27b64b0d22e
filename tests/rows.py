"""Tables of samplers that several tests run."""

from fastdiff.samplers import Sampler


def three_back(schedule, **options):
    """All that a row may do: reach back three rows, visit a timestep again, go up, and not call the network."""
    last = schedule.T - 1
    middle = last // 2
    rows = [  # t, p, q, a, b, c1, c2, c3, e, s
        (last, 0.2, -0.4, 0.5, 0.6, 0, 0, 0, 0.1, 0.5),
        (last, 0.9, 0.2, 0.4, -0.1, 0.3, 0, 0, 0, 0.3),
        (middle, 0.1, 0.7, 0.3, 0.2, 0.4, -0.3, 0, 0, 0),
        (last, 0.6, 0, 0.8, 0.2, -0.1, 0, 0, 0, 0.6),  # up, by noise, with m of x alone
        (last, 0.1, -0.8, 0.3, 0.5, -0.6, 0.3, 0.2, 0.3, 0.2),
        (middle, 0, 0.5, 0.2, 0.7, 0, 0, -0.4, 0, 0.1),
        (0, 0, 0, 0.7, 0, 0.3, -0.2, 0.1, 0, 0),
        (0, 0.3, 0.5, 0.1, 0.8, 0.4, -0.3, 0.2, 0.1, 0),
    ]
    return Sampler(rows, schedule, **options)
