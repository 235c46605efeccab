"""vLLM's real engine core with only the model replaced: what memory policy does, without a GPU."""
