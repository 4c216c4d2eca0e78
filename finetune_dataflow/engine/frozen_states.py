"""Where the outputs of frozen layers are kept from run to run, and which of them a fit takes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_dataflow.engine.files import Location
from finetune_dataflow.engine.settings import require
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.engine.user_cache import user_cache_directory

if TYPE_CHECKING:
    import mlx.nn as nn

    from finetune_dataflow.engine.prefix_states import PrefixStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateStore:
    """A folder of states of frozen layers, each a directory named by what it depends on.

    identity: the base model's fingerprint and whatever else decides what its frozen layers give. budget_bytes: what the folder
    may hold; 0 keeps nothing.
    """

    folder: Path
    identity: Mapping[str, str]
    budget_bytes: int

    def states(self, model: nn.Module, columns: TokenColumns, batch_size: int) -> PrefixStates | None:
        """The states of all rows behind the model's frozen layers, computed now where they are not there.

        None where the model has no frozen layer, nothing may be kept, or, with a log line that says why, they cannot be.
        """
        import mlx.core as mx

        from finetune_dataflow.engine.prefix_states import NoPrefix, frozen_layers, prefix_states, prune

        layers = frozen_layers(model)
        if not layers or not self.budget_bytes:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {**self.identity, "device": str(mx.default_device()), "mlx": importlib.metadata.version("mlx"),
                    "mlx-lm": importlib.metadata.version("mlx-lm")}  # fmt: skip
        whole = json.dumps([identity, layers, columns.fingerprint()], sort_keys=True)
        directory = self.folder / hashlib.sha256(whole.encode()).hexdigest()[:24]
        try:
            found = prefix_states(
                model, columns, layers, directory, identity, batch_size=batch_size, budget_bytes=self.budget_bytes
            )
        except NoPrefix as reason:
            which = "layer is" if layers == 1 else f"{layers} layers are"
            logger.warning("The first %s computed in every epoch: %s.", which, reason)
            return None
        prune(self.folder, self.budget_bytes)
        return found


def store(base_model_fingerprint: str, gigabytes: float) -> StateStore:
    """The folder in the user's cache directory, for states of one base model. Raises UserError for a negative size."""
    require("frozen_states_gb", gigabytes, gigabytes >= 0, "a number of gigabytes, 0 or more")
    folder = Location(user_cache_directory() / "frozen-states")
    return StateStore(folder, {"base_model": base_model_fingerprint}, round(gigabytes * 10**9))
