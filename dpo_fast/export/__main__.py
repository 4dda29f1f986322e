"""`python -m dpo_fast.export` is `dpo-fast export`."""

import sys

from dpo_fast.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "export")
    main()
