"""Plain MLX code without nodes: token columns, batches, losses, the fit, generation, statistics, files.

Nothing here knows of Hamilton. Submodules load on first use (`engine.training`, `engine.generation`, …), so importing the
package costs little; the CPU runtime comes first, because it must stand before MLX.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from finetune_dataflow.engine import c_heap, cpu_runtime

if TYPE_CHECKING:
    from finetune_dataflow.engine import (
        adapters,
        audit,
        batch_encoding,
        batches,
        chat,
        colors,
        comparison,
        content,
        drawing,
        figures,
        files,
        fit_plan,
        formats,
        frozen_states,
        further_metrics,
        generation,
        gguf,
        heads,
        ledger,
        losses,
        memory,
        methods,
        metric_code,
        model_directories,
        model_source,
        models,
        near_duplicates,
        path_contents,
        peft_layout,
        progress,
        prompting,
        quality,
        randomness,
        records,
        rendering,
        reply_store,
        report,
        reporting,
        reporting_settings,
        rouge,
        run_directory,
        settings,
        shapes,
        shards,
        sources,
        splitting,
        starting_weights,
        streaming,
        text_metrics,
        tokens,
        training,
        validation_score,
    )

__all__ = [
    "adapters",
    "audit",
    "batch_encoding",
    "batches",
    "c_heap",
    "chat",
    "colors",
    "comparison",
    "content",
    "cpu_runtime",
    "drawing",
    "figures",
    "files",
    "fit_plan",
    "formats",
    "frozen_states",
    "further_metrics",
    "generation",
    "gguf",
    "heads",
    "ledger",
    "losses",
    "memory",
    "methods",
    "metric_code",
    "model_directories",
    "model_source",
    "models",
    "near_duplicates",
    "path_contents",
    "peft_layout",
    "progress",
    "prompting",
    "quality",
    "randomness",
    "records",
    "rendering",
    "reply_store",
    "report",
    "reporting",
    "reporting_settings",
    "rouge",
    "run_directory",
    "settings",
    "shapes",
    "shards",
    "sources",
    "splitting",
    "starting_weights",
    "streaming",
    "text_metrics",
    "tokens",
    "training",
    "validation_score",
]

c_heap.share_arena()
cpu_runtime.load_fast_blas()


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first named (PEP 562)."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
