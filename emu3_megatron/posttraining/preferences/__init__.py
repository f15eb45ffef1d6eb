"""Learning from preferences (DPO, arXiv 2305.18290): pairs, reference, objective; scores and votes."""
