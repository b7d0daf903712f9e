"""The costs that the paper prints, and ours beside them."""
