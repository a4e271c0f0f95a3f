"""Controlled experiments: variants × seeds of an ordinary run, everything else equal."""
