"""Generated task worlds: data from a seed, and an exact checker that judges any reply."""
