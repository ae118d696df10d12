"""Train a preset: `torchrun --nproc_per_node=2 scripts/pretrain.py demo --training.steps 400`.

Without a preset's name the demo preset is run; tokenizers and packed data that it lacks are made first.
"""

import sys

from ernie_elastic.cli import run

if __name__ == "__main__":
    sys.exit(run("scripts/pretrain.py", "pretrain", sys.argv[1:]))
