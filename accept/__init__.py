"""`make accept`: run first on a real machine, to see that what is proved without it holds."""
