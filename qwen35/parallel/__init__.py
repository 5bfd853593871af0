"""Sharding of a plain model from outside, by its module names, without changes to its code."""
