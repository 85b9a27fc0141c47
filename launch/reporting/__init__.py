"""The report of runs: what they left is read, drawn and put into one page."""
