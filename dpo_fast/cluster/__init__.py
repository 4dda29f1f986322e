"""A run's parts on many workers: Ray Data hands them out, and the store in which they end is the run's.

A worker is an actor that has loaded the engine once; what it does with a part is what one process does with it
(`dpo_fast.scoring`), down to the bytes::

    driver    parts 0 1 2 …  ── Ray Data ──>  outcomes ──> metrics of the store's parts
    worker                      | prepare part 4 | prepare part 6 | …
                                | score, write 1 | score, write 4 | …
    ledger    who is at which part since when; how often a part took its worker down with it

Whatever fails leaves sound parts or none, so it is enough to hand out again what is missing: Ray does so when a worker
dies, the driver when a worker hangs or a node is lost, and the next start when the driver is killed.
"""
