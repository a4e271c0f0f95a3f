"""Turns files and hub data sets into documents."""
