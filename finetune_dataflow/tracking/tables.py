"""Statistics of a table's columns as the Hamilton UI draws them; of texts only how long they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MOST_COLUMNS = 200
BINS = 10
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def columns(frame: pd.DataFrame, named: bool) -> dict[str, dict[str, Any]]:
    """The statistics of each column, by name; not `named`: by place, because names may come from the data."""
    found = {}
    for place in range(min(len(frame.columns), MOST_COLUMNS)):
        name = str(frame.columns[place]) if named else f"column {place + 1}"
        column = frame.iloc[:, place]
        base = {"name": name, "pos": place, "data_type": str(column.dtype), "count": len(column)}
        found[name] = {**base, "missing": int(column.isna().sum()), **_statistics(column)}
    return found


def _statistics(column: pd.Series[Any]) -> dict[str, Any]:
    if pd.api.types.is_bool_dtype(column):
        return {"base_data_type": "boolean", "zeros": int((~column.dropna().astype(bool)).sum())}
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
        values = column.dropna().to_numpy(np.float64)
        values = values[np.isfinite(values)]
        return _of_numbers(values) if len(values) else {"base_data_type": "unhandled"}
    present = column.dropna()
    if len(present) and pd.api.types.infer_dtype(present) == "string":
        lengths = present.str.len().to_numpy(np.float64)
        spread = {"avg_str_len": round(float(lengths.mean()), 2), "std_str_len": round(float(lengths.std()), 2)}
        return {"base_data_type": "str", **spread, "empty": int((lengths == 0).sum())}
    return {"base_data_type": "unhandled"}


def _of_numbers(values: NDArray[np.float64]) -> dict[str, Any]:
    counts, edges = np.histogram(values, BINS)
    return {
        "base_data_type": "numeric",
        "zeros": int((values == 0).sum()),
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "quantiles": {str(each): float(np.quantile(values, each)) for each in QUANTILES},
        "histogram": {f"({low:.6g}, {high:.6g}]": int(count) for (low, high), count in zip(pairwise(edges), counts, strict=True)},
    }
