"""`make accept`: what is run first on a real machine, to see that all which is proved without one holds there too."""
