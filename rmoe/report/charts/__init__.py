"""The report's charts: one module per heading, one function per figure."""
