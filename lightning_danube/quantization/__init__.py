"""Models in fewer bits, by several methods behind one interface, and what is measured of them."""
