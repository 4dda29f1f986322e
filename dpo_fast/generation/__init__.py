"""Parts of `dpo_fast.generate`: which prompts, the weights that answer them, what is written and shown."""
