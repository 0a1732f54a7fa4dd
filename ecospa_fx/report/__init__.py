"""A page to look at: what couplings hold, what a plan keeps of them, and what that costs."""
