"""One rank of a few small fits, or a process alone: `ranks_worker.py DIRECTORY MODEL VARIANT ...`, for tests/test_ranks.

Losses are in each fit's own metrics.jsonl; rank 0 also writes the gradient of every update, as the optimiser is given it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from finetune_dataflow.engine import ranks, training
from finetune_dataflow.engine.frozen_states import StateStore
from finetune_dataflow.engine.interrupts import Stopped
from finetune_dataflow.engine.optimizers import FitOptimizer
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import settings_of

# The values of each fit. With 3 ranks, batches of 5 and 7 rows are shared out unevenly, and of 2 rows one rank has none.
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {"num_layers": 1, "batch_size": 5, "epochs": 2.0},
    "accumulated": {"batch_size": 7, "grad_accumulation_steps": 3, "epochs": 3.0, "max_grad_norm": 0.5},
    "whole": {"fine_tune_type": "full", "batch_size": 2, "epochs": 0.4, "learning_rate": 0.0001},
    "long": {"batch_size": 6, "epochs": 10.0, "save_every": 1000, "grad_accumulation_steps": 2},
}


def rows(count: int, first: int) -> TokenColumns:
    """Rows of 5 to 40 tokens, with 2 to 13 learned ones."""
    return token_columns(
        [
            EncodedRow(n, [n % 200, *[(7 * n + k) % 250 for k in range(2 + 5 * n % 26)]], [*[65 + n % 20] * (1 + n % 12), 258])
            for n in range(first, first + count)
        ]
    )


def record_gradients(directory: Path) -> None:
    """From now on every update writes its gradient beside the others."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    update, number = FitOptimizer.update, iter(range(10**6))

    def recording(self: FitOptimizer, model: Any, gradient: dict[str, Any], rate: float) -> None:
        flat = dict(cast(list[tuple[str, mx.array]], tree_flatten(gradient)))
        mx.save_safetensors(str(directory / f"gradient-{next(number)}.safetensors"), flat)
        update(self, model, gradient, rate)

    FitOptimizer.update = recording  # type: ignore[method-assign, assignment]


def lose_after(updates: int) -> None:
    """From now on this rank kills itself when it is about to share its gradient of the update after so many."""
    summed = training._Fit._sum_over_ranks

    def killing(fit: training._Fit, team: ranks.Team) -> None:
        if fit.state.updates == updates:
            os.kill(os.getpid(), signal.SIGKILL)
        summed(fit, team)

    training._Fit._sum_over_ranks = killing  # type: ignore[method-assign, assignment]


def interrupt_after(batches: int) -> None:
    """From now on this process is asked to end while it computes the batch after so many."""
    accumulate = training._Fit._accumulate

    def asking(fit: training._Fit, current: Any) -> None:
        if fit.state.batches == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        accumulate(fit, current)

    training._Fit._accumulate = asking  # type: ignore[method-assign, assignment]


def main(directory: Path, model: Path, variants: list[str]) -> int:
    """Fit each variant in a directory of its own. Exit codes as the command line's."""
    try:
        with ranks.joined() as team:
            rank = 0 if team is None else team.rank
            if f"RANK_{rank}_LOST_AFTER" in os.environ:
                lose_after(int(os.environ[f"RANK_{rank}_LOST_AFTER"]))
            if f"RANK_{rank}_INTERRUPTED_AFTER" in os.environ:
                interrupt_after(int(os.environ[f"RANK_{rank}_INTERRUPTED_AFTER"]))
            for variant in variants:
                place = directory / variant if rank == 0 else directory / f"{variant}-of-rank-{rank}"
                place.mkdir(parents=True, exist_ok=True)
                if rank == 0 and variant != "long":
                    record_gradients(place)
                store = StateStore(directory.parent / "states", {"base": "tiny"}, 10**9)
                first = 1 if os.environ.get("OTHER_ROWS") != str(rank) else 2
                training.fit(
                    model,
                    rows(37, first),
                    rows(7, 100),
                    settings_of(**{"learning_rate": 0.001, **VARIANTS[variant]}),
                    place,
                    {},
                    store=store,
                )
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
