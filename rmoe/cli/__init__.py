"""The `rmoe` command: one thin file per verb."""
