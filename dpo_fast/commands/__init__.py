"""The command line's commands, by what they are about; `dpo_fast.cli` gives them their names."""
