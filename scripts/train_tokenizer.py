"""Train a tokenizer with several processes: `torchrun --nproc_per_node=2 scripts/train_tokenizer.py audio ...`.

The options are those of `ernie-elastic train-tokenizer`.
"""

import sys

from ernie_elastic.cli import run

if __name__ == "__main__":
    sys.exit(run("train_tokenizer.py", "train_tokenizer", sys.argv[1:]))
