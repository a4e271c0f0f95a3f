"""Reads the files of runs and draws figures for the notebooks. Needs the extra `notebooks`."""

from lightning_danube.extras import need

need("notebooks", "lightning_danube.reports")
