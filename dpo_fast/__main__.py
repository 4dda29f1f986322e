"""`python -m dpo_fast` is `dpo-fast`."""

from dpo_fast.cli import main

if __name__ == "__main__":
    main()
