"""Who works on what, and in which order: pure decisions, no ray, no torch.

`ledger` knows where every prompt is; `routing` chooses a worker that is fresh enough; `crew` knows which workers
there are and which there should be, `scaling` how many that is; `signal` wakes the loops that wait for any of it.
"""
