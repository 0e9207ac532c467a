"""One command a figure: every module here measures one thing and prints one JSON line last."""
