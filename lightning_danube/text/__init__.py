"""A file or a hub set becomes documents."""
