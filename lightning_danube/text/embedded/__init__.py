"""Text that is on every machine: documentation of installed packages, and a made-up world."""
