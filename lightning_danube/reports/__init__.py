"""Reads what runs leave behind and draws it; notebooks show the results. Needs the extra `notebooks`."""

from lightning_danube.extras import need

need("notebooks", "lightning_danube.reports")
