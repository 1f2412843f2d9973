"""Watch a distillation run: `python monitor_distillation.py [RUN_DIR] [--once]`, the same as `cvm-translator monitor`.

It may start before, during or after the run, reads only the run folder's files, and never disturbs the run.
"""

import sys

from cvm_translator.cli import main

if __name__ == "__main__":
    sys.exit(main(["monitor", *sys.argv[1:]]))
