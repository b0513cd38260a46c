"""Golden numbers: independent implementations' inputs and outputs, run through our functions."""
