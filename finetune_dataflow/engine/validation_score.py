"""A better judge of an adapter than its loss: ROUGE of the replies it generates to a few validation prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn

from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.fit_plan import chosen_rows
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.generation import replies_of
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.engine.tokens import TokenColumns

ROWS_AT_ONCE = 16


def score(
    settings: FitSettings, validation: TokenColumns, base_model_path: Path, chat_template: str
) -> Callable[[nn.Module], float] | None:
    """What gives a model its mean `best_metric` over best_metric_rows validation rows; None where the loss decides.

    Replies are greedy, and as long as the longest reference may be.
    """
    metric = settings.loop.best_metric
    if metric == "loss":
        return None
    from finetune_dataflow.engine.rouge import rouge_by_row  # its library takes seconds to import

    rows = chosen_rows(validation, settings.loop.best_metric_rows, settings.random_state)
    encoder = load_encoder(base_model_path, chat_template)
    prompts = [rows.prompt(index) for index in range(len(rows))]
    ends = [rows.row_ids(index)[len(prompts[index]) :].tolist() for index in range(len(rows))]
    references = [encoder.reply_text([each for each in end if each not in encoder.stop_ids]) for end in ends]
    generation = GenerationSettings(max_tokens=max(map(len, ends)), generation_batch_size=ROWS_AT_ONCE)

    def mean_rouge(model: nn.Module) -> float:
        model.eval()
        replies = replies_of(model, prompts, encoder, generation, "replies to choose by")
        return float(rouge_by_row([encoder.reply_text(each.token_ids) for each in replies], references)[metric].mean())

    return mean_rouge
