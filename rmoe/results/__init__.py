"""Every file format that users read, as typed records. Imports no torch."""
