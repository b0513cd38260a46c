"""Generated task worlds: data from a seed, and an exact verifier that judges any reply."""
