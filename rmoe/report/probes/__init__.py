"""Probe results to statistics, tables, figures and a page. Imports no torch."""
