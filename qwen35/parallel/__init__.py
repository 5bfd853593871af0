"""Sharding from outside: takes a plain model, knows its module names, changes none of its code."""
