"""Numbers to tables, figures and one HTML page that opens from disk. Imports no torch."""
