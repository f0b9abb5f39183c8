"""Compiled reductions of per-sample gradients that XLA does not fuse well.

Running top-k and arg-max of rank-one and sequence-sum gradients, fused square-accumulate. Each
kernel is one file: the equation, a jnp reference, a CPU version and a Pallas version for GPU, all
with the same signature; the reference is the oracle. Imported as `replay.kernels`, by
`replay.grads` alone; imports nothing from `replay`.
"""
