"""Reads what runs leave behind and draws it; notebooks show the results. Needs the extra `notebooks`."""
