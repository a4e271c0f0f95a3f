"""The parts of an evaluation: each asks its questions and scores the answers."""
