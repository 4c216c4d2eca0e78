"""What a report says besides its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.run_directory import RunIdentity


@dataclass(frozen=True)
class ReportParts:
    """What a report says besides its figures.

    Verdict, the metric it goes by, scores, rows, ledger, audits, identity, settings (YAML), graph (SVG).
    """

    verdict: str
    judge: str
    comparison: dict[str, dict[str, Any]]
    predictions: pd.DataFrame
    row_ledger: pd.DataFrame
    quality: Sequence[str]
    label_audit: LabelAudit
    hold_out_audit: LabelAudit
    identity: RunIdentity
    directory: Path
    settings: str
    drawing: str
