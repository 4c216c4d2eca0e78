"""The front door: `python run.py --help`. The same as the console script `finetune-dataflow`."""

from finetune_dataflow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
