"""Sizes that DeepSpeed's buffers may reach; no torch, because the planner counts with them."""

BUCKET_ELEMENTS = 200_000_000
"""Upper limit of the communication buckets in elements (DeepSpeed's default is 5e8)."""
GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: weights that ZeRO 3 keeps gathered at most."""
ALLREDUCE_ELEMENTS = 500_000_000
"""Gradients that travel together in stages 0 and 1, where no bucket is set."""
