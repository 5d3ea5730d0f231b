"""Defects that are planted on purpose, to see which audits notice them."""
