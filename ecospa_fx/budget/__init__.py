"""Budget: how many units each coupling keeps, and which."""
