"""`python -m cvm_translator` is the command `cvm-translator`."""

import sys

from cvm_translator.cli import main

if __name__ == "__main__":
    sys.exit(main())
