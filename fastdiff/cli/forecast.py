"""``fastdiff forecast``."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff.cli.inputs import add_table_options, check_output, check_picture, inputs_of, reading
from fastdiff.cli.parser import add_command, add_common, add_method, add_overwrite, add_quantiles, backend_of
from fastdiff.errors import FastdiffError, check_int, check_seed

SHOWN = 3  # windows of the past in the figure


def add(commands: Any) -> None:
    forecast = add_command(
        commands,
        "forecast",
        "draw what comes after a recording",
        "Draws what follows a recording, a line for each time, from a model of its windows,\n"
        "many times: the end of a window given its beginning, rolling on where that is too\n"
        "short. A model with known inputs reads them from the columns of --covariates: then\n"
        "the last lines of DATA, as many as --horizon, have these alone.\n"
        "A .csv or .parquet file gets a line for each time of each draw, or with --quantiles\n"
        "one for each time; an .npy file the array (draws, horizon, channels).",
        "examples:\n"
        "  fastdiff forecast m.safetensors weather.csv -o next.csv --horizon 24\n"
        "  fastdiff forecast m.safetensors weather.csv -o next.csv --horizon 24 \\\n"
        "      --quantiles 0.05,0.5,0.95 --plot fan.png\n",
    )
    forecast.add_argument("model", metavar="MODEL", help="a .safetensors file written by fastdiff train --window")
    forecast.add_argument("data", metavar="DATA", help="a .csv, .parquet or .npy file of a recording")
    add_table_options(forecast)
    forecast.add_argument("-o", "--output", metavar="FILE", required=True, help="a .csv, .parquet or .npy file")
    forecast.add_argument("--horizon", type=int, required=True, metavar="N", help="how many lines")
    forecast.add_argument("--draws", type=int, default=100, metavar="K", help="how often (default 100)")
    add_quantiles(forecast)
    forecast.add_argument("--plot", metavar="FILE", help="draw the end of the recording and a fan into this .png")
    add_method(forecast)
    add_overwrite(forecast)
    add_common(forecast, seed="of the noise (default: the model's)", usual_seed=None)
    forecast.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    import fastdiff as fd
    from fastdiff import plots, series

    draws, horizon = check_int("--draws", args.draws, low=1), check_int("--horizon", args.horizon, low=1)
    seed = None if args.seed is None else check_seed(args.seed, "--seed")
    check_output(args, args.output, series.ENDINGS)
    if args.plot:
        check_picture(args, args.plot)
    model = fd.load(args.model, backend=backend_of(args))
    assert model.net is not None
    if len(model.net.shape) > 2:
        raise FastdiffError(f"{args.model} is a model of pictures")
    X = series.load_recording(args.data, **reading(args))
    frame = series.Frame.of(X, args.data) if series.is_frame(X) else None
    options: dict[str, Any] = {"method": args.method, "seed": seed, "progress": not args.quiet}
    inputs = inputs_of(args, model)
    if inputs is not None:
        if not np.isnan(series.recording(X)[0][-horizon:]).all() or len(inputs) <= horizon:
            raise FastdiffError(
                f"{args.data}: the last {horizon} lines have values; they are to have known inputs alone"
            )
        seen, options["covariates"] = len(inputs) - horizon, inputs
        X = X.head(seen) if isinstance(X, series.Columns) else X[:seen]
        frame = series.Frame.of(X, args.data) if series.is_frame(X) else None
    found = model.forecast(X, horizon, draws, quantiles=args.quantiles, **options)
    values = found if frame is None else np.stack([series.Frame.of(one).values for one in _listed(found)])
    series.save_answers(args.output, values, frame, args.quantiles, model.channel_names)
    what = f"{draws} draws" if args.quantiles is None else f"{len(args.quantiles)} quantiles of {draws} draws"
    print(f"{args.output}: {what} of the next {horizon} rows")
    if args.plot:
        past = series.recording(X)[0]
        past = past[-SHOWN * model.net.shape[0] :]
        levels = args.quantiles or plots.BANDS
        of_levels = values if args.quantiles else np.quantile(values, levels, axis=0)
        shape = (len(past) + horizon, *past.shape[1:])
        known = np.full(shape, np.nan)
        known[: len(past)] = past
        lines = {level: np.concatenate([np.full(past.shape, np.nan), one.reshape(horizon, *shape[1:])])
                 for level, one in zip(levels, of_levels, strict=True)}  # fmt: skip
        figure = plots.bands(
            known, lines, names=None if frame is None else frame.names, title=f"The next {horizon} rows"
        )
        plots.save(figure, args.plot)
        print(f"{args.plot}: the end of the recording and what was drawn")
    return 0


def _listed(found: Any) -> list[Any]:
    return list(found.values()) if isinstance(found, dict) else found
