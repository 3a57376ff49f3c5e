"""Who works on what, and in which order: pure decisions, no ray, no torch.

`ledger` knows where every prompt is; `routing` chooses a worker that is fresh enough; `signal` wakes the
loops that wait for either.
"""
