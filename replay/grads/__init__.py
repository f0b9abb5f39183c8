"""Per-sample gradients in factored form: taps, what is asked of them, the public surface."""
