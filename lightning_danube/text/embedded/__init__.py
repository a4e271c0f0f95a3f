"""Texts that need no download: documentation of installed packages, and a made-up world."""
