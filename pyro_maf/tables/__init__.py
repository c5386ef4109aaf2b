"""Tables of numbers: in memory, in files and in text."""
