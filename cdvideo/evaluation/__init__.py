"""Measuring: the judge that names what is in a picture, metrics, and the base's report (no torch at import)."""
