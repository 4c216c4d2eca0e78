"""Which fast ways of computing the loss are exact on the loaded model: each proves itself or steps aside.

Before the first step the loss and the gradient of real batches are computed the plain way and the fast way. Rounding aside
they must be equal; a mask that lets rows see each other changes the loss by less than a thousandth and the gradient by more
than its own size, so it is the gradient that tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from finetune_dataflow.engine import exponentials
from finetune_dataflow.engine.batches import Batch, in_parts
from finetune_dataflow.engine.exponentials import as_powers
from finetune_dataflow.engine.heads import output_head
from finetune_dataflow.engine.losses import PLAIN, LossPath, model_dtype
from finetune_dataflow.engine.packing import NotPackable
from finetune_dataflow.engine.prefix_states import NoPrefix, PrefixStates

logger = logging.getLogger(__name__)

TOLERANCE, HALF_PRECISION = 1e-4, 2e-2  # of the loss, and of the gradient's norm
OF_EXPONENTIALS = 1e-3  # MLX's own and these are both exact to 2e-6, and a model amplifies that
REFUSALS = (ValueError, IndexError, TypeError, RuntimeError, AttributeError, NotPackable, NoPrefix)
Computed = tuple[float, dict[str, mx.array]]  # loss, and gradient by parameter
NAMES = {
    "gathered": "the output head on supervised positions only",
    "exponentials": "exponentials as powers of two",
    "prefix": "stored states of the frozen layers",
    "packing": "several rows to a line",
}


@dataclass(frozen=True)
class Sample:
    """Rows as the plain path takes them, a row to a line, and packed where the fit may pack rows."""

    plain: Batch
    packed: Batch | None = None


def proven_path(model: nn.Module, samples: Sequence[Sample], states: PrefixStates | None = None) -> LossPath:
    """The path whose loss and gradient equal the plain path's on every sample, with all that is exact on this model.

    Equal means within 1e-4 of the loss and of the gradient's norm in float32, 2e-2 in half precision; for the exponentials
    1e-3. What is not exact, or not possible, is left out, and a warning says why.
    states: those of the frozen layers for the samples' rows, where the fit has them.
    """
    return _Proof(model, samples, states).path()


class _Proof:
    """The arguments of `proven_path`, and what was computed for it."""

    def __init__(self, model: nn.Module, samples: Sequence[Sample], states: PrefixStates | None) -> None:
        self.model, self.samples, self.states = model, samples, states
        self.tolerance = TOLERANCE if model_dtype(model) == mx.float32 else HALF_PRECISION
        self.references: dict[tuple[LossPath, int], Computed] = {}

    def path(self) -> LossPath:
        left_out: list[str] = []
        base = PLAIN
        if exponentials.usable():
            powers = LossPath(exponentials=True)
            why = self._difference(powers, PLAIN, 0, OF_EXPONENTIALS)
            if why is None:
                base = powers
            else:
                left_out.append(f"{NAMES['exponentials']}: {why}")
        wanted: dict[str, Any] = {}
        if output_head(self.model) is not None:
            wanted["gathered"] = True
        else:
            left_out.append(f"{NAMES['gathered']}: this model's output head was not found")
        if self.states is not None:
            wanted["prefix"] = self.states.layers
        if any(each.packed is not None for each in self.samples):
            wanted["packing"] = True
        proven, reasons = self._proven(base, wanted)
        left_out += reasons
        for each in left_out:
            logger.warning("The fit goes without %s. It is slower, and exact.", each)
        taken = [text for name, text in NAMES.items() if getattr(proven, name)]
        told = f"{', '.join(taken)}: proven equal on {len(self.samples)} batches" if taken else "the plain path"
        return replace(proven, reason="; ".join([told, *(f"without {each}" for each in left_out)]))

    def _proven(self, base: LossPath, wanted: dict[str, Any]) -> tuple[LossPath, list[str]]:
        """The path with everything wanted where that is exact; else with what is exact by itself. And why something is not."""
        if not wanted:
            return base, []
        together = replace(base, **wanted)
        why = self._differs(together, base)
        if why is None:
            return together, []
        if len(wanted) == 1:
            return base, [f"{NAMES[next(iter(wanted))]}: {why}"]
        reasons, exact = [], dict[str, Any]()
        for name, value in wanted.items():
            alone = self._differs(replace(base, **{name: value}), base)
            if alone is None:
                exact[name] = value
            else:
                reasons.append(f"{NAMES[name]}: {alone}")
        if len(exact) == len(wanted):  # exact alone, not together: the first is kept
            kept, *dropped = exact
            exact = {kept: exact[kept]}
            reasons = [f"{NAMES[name]}: {why}, with {NAMES[kept]}" for name in dropped]
        path, more = self._proven(base, exact)
        return path, [*reasons, *more]

    def _differs(self, path: LossPath, reference: LossPath) -> str | None:
        """Why a path is not equal to the reference on all samples; None where it is."""
        found = (self._difference(path, reference, number, self.tolerance) for number in range(len(self.samples)))
        return next((each for each in found if each is not None), None)

    def _difference(self, path: LossPath, reference: LossPath, number: int, tolerance: float) -> str | None:
        """How loss or gradient of a path differ from the reference's on one sample; None where they do not."""
        plain_loss, plain_gradient = self._reference(reference, number)
        sample = self.samples[number]
        given = sample.packed if path.packing and sample.packed is not None else sample.plain
        if path.prefix and self.states is not None:
            given = self.states.given(given)
        try:
            loss, gradient = found = _computed(self.model, path, given)
        except REFUSALS as error:
            return f"this model does not take it ({error})"
        apart = abs(loss - plain_loss)
        if not apart <= tolerance * abs(plain_loss):
            return f"the loss differs by {apart:.2g}"
        norm = _norm(plain_gradient.values())
        apart = _norm(one - gradient[name] for name, one in plain_gradient.items())
        if not apart <= tolerance * norm:
            return f"the gradient differs by {apart / norm if norm else apart:.2g} of its norm"
        if given is sample.plain and not path.gathered:
            self.references = {(path, number): found}  # the reference of what follows
        return None

    def _reference(self, path: LossPath, number: int) -> Computed:
        """Loss and gradient of a sample by a reference path; only one gradient is kept, since a model's may be large."""
        if (path, number) not in self.references:
            self.references = {(path, number): _computed(self.model, path, self.samples[number].plain)}
        return self.references[path, number]


def _computed(model: nn.Module, path: LossPath, batch: Batch) -> Computed:
    """Loss and gradient; row by row where every position's logits are made, which for many rows are more than a fit holds."""
    whole = path.gathered or batch.segments is not None or batch.states is not None
    parts = [batch] if whole else in_parts(batch, len(batch.inputs))
    loss, gradient = 0.0, dict[str, mx.array]()
    for part in parts:
        if not part.supervised:  # a line that only pads has no loss of its own
            continue
        share = part.supervised / batch.supervised
        with as_powers(path.exponentials):
            found, of_part = nn.value_and_grad(model, path.mean_loss)(model, part)
            of_part = {name: each * share for name, each in _flat(of_part)} if share != 1.0 else dict(_flat(of_part))
            gradient = {name: gradient[name] + each for name, each in of_part.items()} if gradient else of_part
            mx.eval(found, gradient)
        loss += float(found) * share
    return loss, gradient


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def _norm(arrays: Iterable[mx.array]) -> float:
    return math.sqrt(sum(float(np.square(np.array(each.astype(mx.float32)), dtype=np.float64).sum()) for each in arrays))
