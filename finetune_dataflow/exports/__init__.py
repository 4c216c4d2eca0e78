"""Exports: a tuned model for other tools, each read back, scored against the model it was made of, and described by a card.

`flow` is a dataflow that stands on top of the package's own under start="presaved":

    driver.Builder().with_config({"start": "presaved"}).with_modules(finetune_dataflow, finetune_dataflow.exports.flow)
"""
