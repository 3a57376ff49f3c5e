"""Publishing a policy version: lay parameters out in one buffer, move it, verify it, say who serves it.

`layout` orders tensors so that an engine can point at them; `buffer` fills and checks the bytes;
`transport` moves them (Ray's object store: zero-copy on a node); `sync` keeps every worker on the
newest version and knows what each one serves; `collective` does so where all have to take part at once.
"""
